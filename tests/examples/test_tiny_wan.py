import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import T5Tokenizer

from draftattn.errors import InputError
from examples.tiny_wan import train as program
from examples.tiny_wan.__main__ import app
from examples.tiny_wan.clips import draw_windows, read_scenes, read_shots
from examples.tiny_wan.latents import Latents, encode_windows
from examples.tiny_wan.loop import Budget
from examples.tiny_wan.recipe import PRESETS, TransformerRecipe
from examples.tiny_wan.text import build_tokenizer
from examples.tiny_wan.transformer import TransformerTrainer, build_transformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMOKE = PRESETS["smoke"]


def _train(clips, run):
    options = ["--clips", str(clips), "--captions", str(clips / "clips.json"), "--preset", "smoke", "--no-compile"]
    app(
        ["train", *options, "--run", str(run), "--vae-iterations", "3", "--transformer-iterations", "4"],
        standalone_mode=False,
    )


@pytest.fixture(scope="module")
def run(clips, tmp_path_factory):
    """A run whose transformer's training was killed and continued."""
    folder = tmp_path_factory.mktemp("run")
    step = TransformerTrainer.step

    def killed(self, share):
        if self.state.step == 2:
            self.state.save(folder / "transformer.safetensors")
            raise RuntimeError("killed")
        return step(self, share)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerTrainer, "step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            _train(clips, folder)
    assert not (folder / "pipeline").exists()
    _train(clips, folder)
    return folder


def test_stock_diffusers_runs_the_pipeline(run):
    pipe = DiffusionPipeline.from_pretrained(run / "pipeline", dtype=torch.float32).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    for size in ({"height": 64, "width": 112, "num_frames": 9}, {"height": 96, "width": 48, "num_frames": 5}):
        frames = pipe("a clock", **size, num_inference_steps=2, output_type="np").frames[0]
        assert frames.shape == (size["num_frames"], size["height"], size["width"], 3)
        assert frames.std() > 0
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in run.rglob("*"))


def test_a_killed_run_gives_the_same_pipeline(run, clips, tmp_path):
    if DEVICE == "cuda":
        pytest.skip("sums on GPUs come in no fixed order")
    shutil.copy(run / "autoencoder.safetensors", tmp_path)
    _train(clips, tmp_path)
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "pipeline" / name).read_bytes() == (run / "pipeline" / name).read_bytes()


def test_evaluation_and_card(run, clips, tmp_path):
    options = ["--clips", str(clips), "--captions", str(clips / "clips.json")]
    figures, sheet, card = (tmp_path / name for name in ("figures.json", "sheet.jpg", "README.md"))
    evaluate = ["--pipeline", str(run / "pipeline"), "--output", str(figures), "--preset", "smoke"]
    app(["evaluate", *options, *evaluate, "--sheet", str(sheet), "--steps", "2"], standalone_mode=False)
    result = json.loads(figures.read_text())
    for group in ("held_out", "learnt"):
        means = result["reconstruction"][group]["mean"]
        assert set(means["psnr"]) == {"frames 0-4", "frames 5-8"}
        assert len(result["reconstruction"][group]["per_frame"]["psnr"]) == 9
        # an untrained network predicts about nothing, and the target's mean square is 2
        assert 1 < result["flow_loss"][group]["mean"] < 3
    with Image.open(sheet) as image:
        assert image.size == (5 * 56, 2 * (32 + 14))

    captions = ["--captions", str(clips / "clips.json")]
    figures_of = ["--run", str(run), "--evaluation", str(figures), "--against", str(figures)]
    app(["card", *captions, *figures_of, "--output", str(card)], standalone_mode=False)
    text = card.read_text()
    for words in ("held out 1.25 s to the end", "moving bars", "the model before, held out, frames 5-8"):
        assert words in text
    assert f"{result['reconstruction']['held_out']['mean']['psnr']['frames 5-8']:.2f} dB" in text


def test_latents_are_normalised_and_come_back_from_disk(clips, tmp_path):
    torch.manual_seed(0)
    device = torch.device(DEVICE)
    shots = read_shots(clips, read_scenes(clips / "clips.json"), SMOKE.video, device)
    windows = draw_windows(shots, SMOKE.video, torch.Generator().manual_seed(0))
    vae = program.build_autoencoder(SMOKE.autoencoder).to(device)
    latents = encode_windows(vae, shots, windows, SMOKE.video, batch=3)
    assert latents.values.shape == (4, 16, 3, 8, 14)
    values = latents.values.float()
    assert values.mean((0, 2, 3, 4)).abs().max() < 1e-2
    assert (values.std((0, 2, 3, 4)) - 1).abs().max() < 1e-2
    latents.save(tmp_path / "latents.safetensors")
    loaded = Latents.load(tmp_path / "latents.safetensors", device)
    assert torch.equal(loaded.values, latents.values)
    assert (loaded.captions, loaded.mean, loaded.std) == (latents.captions, latents.mean, latents.std)


def _trainer(recipe, latents, text):
    """A trainer whose last caption is the empty one."""
    transformer = build_transformer(recipe).to(latents.values.device)
    return TransformerTrainer(
        transformer, latents, text[:-1], text[-1:], recipe, short_frames=1, seed=0, compiled=False
    )


def test_the_transformer_learns(clips):
    torch.manual_seed(0)
    device = torch.device(DEVICE)
    values = torch.randn(2, 16, 2, 4, 4, device=device).half()
    latents = Latents(values, ("a", "b"), torch.tensor([0, 1], device=device), (0.0,) * 16, (1.0,) * 16)
    sizes = {"num_layers": 2, "num_heads": 1, "ffn_dim": 64, "long_batch": 16, "short_batch": 16}
    recipe = TransformerRecipe(**sizes, learning_rate=5e-3, muon_learning_rate=1e-2)
    text = torch.randn(3, 8, 64, device=device)
    trainer = _trainer(recipe, latents, text)
    losses = []
    for number in range(45):
        losses.append(trainer.step(0.02 + 0.9 * number / 45).item())
        trainer.state.step += 1
    assert abs(losses[0] - 2) < 0.3
    assert sum(losses[-6:]) / 6 < 0.75 * losses[0]
    pairs = zip(trainer.average.parameters(), trainer.transformer.parameters(), strict=True)
    drift = [(average - weight).abs().max() for average, weight in pairs]
    assert 0 < max(drift) < 0.1


def test_the_target_is_noise_minus_data():
    latents = Latents(torch.full((2, 16, 2, 4, 4), 3.0), ("a",), torch.tensor([0, 0]), (0.0,) * 16, (1.0,) * 16)
    recipe = TransformerRecipe(num_layers=1, num_heads=1, ffn_dim=64, caption_dropout=1.0)
    text = torch.randn(2, 8, 64)
    trainer = _trainer(recipe, latents, text)
    seen = {}

    def predict_zero(mixed, timestep, embeddings, return_dict):
        seen.update(mixed=mixed, level=timestep.view(-1, 1, 1, 1, 1) / 1000, text=embeddings)
        return (torch.zeros_like(mixed),)

    trainer.transformer = predict_zero
    loss = trainer.loss(batch=5, num_frames=1)
    noise = (seen["mixed"] - (1 - seen["level"]) * 3) / seen["level"]
    assert seen["mixed"].shape == (5, 16, 1, 4, 4)
    torch.testing.assert_close(loss, (noise - 3).square().mean(), rtol=1e-3, atol=0)
    assert torch.equal(seen["text"], text[1:].expand(5, -1, -1))


def test_noise_levels_cover_their_range():
    latents = Latents(torch.randn(2, 16, 1, 4, 4), ("a",), torch.tensor([0, 0]), (0.0,) * 16, (1.0,) * 16)
    recipe = TransformerRecipe(num_layers=1, num_heads=1, ffn_dim=64, shifted_share=0.0)
    trainer = _trainer(recipe, latents, torch.randn(2, 8, 64))
    levels = trainer._noise_levels(50).sort().values
    places = torch.arange(50) / 50
    assert ((levels >= places.clamp_min(1e-3)) & (levels <= places + 0.02)).all()


def test_the_tokenizer_equals_the_one_in_assets(repository_assets):
    ours = build_tokenizer()
    theirs = T5Tokenizer.from_pretrained(repository_assets / "tiny-wan" / "tokenizer")
    for words in ("hands moving red cups on a white table", "Zebra 42 & (c)!", ""):
        assert ours(words)["input_ids"] == theirs(words)["input_ids"]
    assert len(ours) == len(theirs)


def test_another_recipe_is_refused(run, clips):
    with pytest.raises(InputError, match="another recipe"):
        program.train(
            clips,
            clips / "clips.json",
            run,
            PRESETS["full"],
            Budget(iterations=1),
            Budget(iterations=1),
            device=torch.device(DEVICE),
            compiled=False,
        )
