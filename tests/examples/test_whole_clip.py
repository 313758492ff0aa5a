import pytest
import torch
from diffusers import AutoencoderKLWan

from draftattn.errors import InputError
from examples.tiny_wan.autoencoder import build_autoencoder, set_layout
from examples.tiny_wan.recipe import PRESETS
from examples.tiny_wan.whole_clip import WholeClip


def _published() -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)


def _folded() -> AutoencoderKLWan:
    return build_autoencoder(PRESETS["smoke"].autoencoder)


def _randomised(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    for name, weight in vae.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return vae.eval()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("build", [_published, _folded], ids=["wan2.1", "folded"])
@pytest.mark.parametrize("num_frames", [1, 9])
@torch.no_grad()
def test_equals_the_chunked_run(build, num_frames, channels_last):
    torch.manual_seed(0)
    vae = _randomised(build())
    set_layout(vae, channels_last)
    video = torch.rand(2, 3, num_frames, 32, 48) * 2 - 1
    latents = torch.randn(2, 16, 1 + num_frames // 4, 4, 6)
    exact = build().double().eval()
    exact.load_state_dict(vae.state_dict())

    mean, log_variance = WholeClip(vae).encode(video)
    chunked, truth = vae.encode(video).latent_dist, exact.encode(video.double()).latent_dist
    for ours, theirs, value in ((mean, chunked.mean, truth.mean), (log_variance, chunked.logvar, truth.logvar)):
        assert (ours - value).abs().max() <= 4 * (theirs - value).abs().max()

    ours, theirs, value = (
        WholeClip(vae).decode(latents).clamp(-1, 1),
        vae.decode(latents).sample,
        exact.decode(latents.double()).sample,
    )
    assert ours.shape == (2, 3, num_frames, 32, 48)
    assert (ours - value).abs().max() <= 4 * (theirs - value).abs().max()


def test_gradients_reach_every_weight():
    torch.manual_seed(0)
    vae = _folded()
    clip = WholeClip(vae)
    mean, log_variance = clip.encode(torch.rand(1, 3, 9, 32, 32))
    (clip.decode(mean).square().mean() + log_variance.mean()).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in vae.parameters())


def test_refuses_residual_sampling():
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1, is_residual=True)
    with pytest.raises(InputError, match="is_residual"):
        WholeClip(vae)
