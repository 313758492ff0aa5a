"""What is trained and how: every number of the recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from draftattn.errors import InputError


def _check(right: bool, name: str, value: object, allowed: str) -> None:
    if not right:
        raise InputError(f"{name} must be {allowed}; got {value!r}")


@dataclass(frozen=True)
class VideoRecipe:
    """Windows of the clips.

    Args:
        height: pixels of a window, a multiple of 16.
        width: pixels of a window, a multiple of 16.
        num_frames: frames of a window, 4k + 1.
        short_frames: frames of the shorter windows that both networks also see, 4k + 1.
        margin: clips are decoded this much larger than a window, so that windows can be cropped.
        frame_rate: frames are skipped so that windows come near this rate, where a scene is long enough.
        windows_per_caption: windows of each caption that the transformer learns.
    """

    height: int = 256
    width: int = 448
    num_frames: int = 33
    short_frames: int = 17
    margin: float = 1.125
    frame_rate: float = 15.0
    windows_per_caption: int = 80

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            _check(value > 0 and value % 16 == 0, name, value, "a positive multiple of 16")
        for name in ("num_frames", "short_frames"):
            value = getattr(self, name)
            _check(value >= 5 and value % 4 == 1, name, value, "4k + 1 and at least 5")
        _check(self.short_frames <= self.num_frames, "short_frames", self.short_frames, "at most num_frames")
        _check(self.margin >= 1, "margin", self.margin, "at least 1")
        _check(self.windows_per_caption > 0, "windows_per_caption", self.windows_per_caption, "positive")

    @property
    def decoded_size(self) -> tuple[int, int]:
        """Height and width to which clips are decoded."""
        return round(self.height * self.margin), round(self.width * self.margin)


@dataclass(frozen=True)
class Crops:
    """A batch of crops for the autoencoder: ``[batch, 3, num_frames, height, width]``."""

    batch: int
    num_frames: int
    height: int
    width: int


@dataclass(frozen=True)
class AutoencoderRecipe:
    """The video autoencoder and its training.

    Pixels are folded 2x2 into channels first (``patch_size``), as in Wan2.2's autoencoder: two levels of
    down-sampling then suffice for 8x8, and no convolution runs at full resolution.

    Args:
        base_dim: channels of the encoder's first level.
        decoder_base_dim: channels of the decoder's last level.
        dim_mult: channels of each level, as multiples of the base.
        early: batches taken in turn in the first half of the budget.
        late: batches taken in turn in the second half.
        learning_rate: peak of AdamW's.
        mse_weight: weight of the squared error beside the absolute error, whose weight is 1.
        temporal_weight: weight of the absolute error of frame-to-frame differences.
        lpips_weight: weight of the perceptual distance (LPIPS on AlexNet).
        lpips_frames: frames of a batch on which it is computed.
        kl_weight: weight of the mean Kullback-Leibler term of a latent element.
        channels_last: memory layout of the convolutions; None measures both and takes the faster.
    """

    base_dim: int = 24
    decoder_base_dim: int = 32
    dim_mult: tuple[int, ...] = (1, 2, 3)
    early: tuple[Crops, ...] = (Crops(12, 17, 128, 128), Crops(6, 33, 128, 128))
    late: tuple[Crops, ...] = (Crops(6, 33, 128, 128), Crops(3, 17, 256, 256), Crops(1, 33, 256, 448))
    learning_rate: float = 6e-4
    warmup: float = 0.02
    decay_start: float = 0.45
    mse_weight: float = 0.5
    temporal_weight: float = 0.25
    lpips_weight: float = 0.2
    lpips_frames: int = 6
    kl_weight: float = 3e-4
    channels_last: bool | None = None

    def __post_init__(self) -> None:
        _check(len(self.dim_mult) == 3, "dim_mult", self.dim_mult, "three multiples, for 8x8 after folding 2x2")
        _check(bool(self.early) and bool(self.late), "early and late", (self.early, self.late), "not empty")
        _check(self.learning_rate > 0, "learning_rate", self.learning_rate, "positive")


@dataclass(frozen=True)
class TransformerRecipe:
    """The transformer and its training by flow matching.

    Args:
        num_layers: blocks.
        num_heads: heads of 64 dimensions each.
        ffn_dim: hidden size of the feed-forward.
        long_batch: windows of full length in a batch.
        short_batch: windows cut to the short length in a batch.
        learning_rate: peak of AdamW's (embeddings, norms, biases, last projection).
        muon_learning_rate: peak of Muon's (matrices inside blocks); 0 leaves these to AdamW too.
        shifted_share: share of noise levels drawn with the shift, the others uniformly.
        shift: shift of the noise levels, the scheduler's flow_shift.
        caption_dropout: share of samples without their caption.
        ema_power: weights are averaged over the run with the power t^ema_power (EDM2, arXiv 2312.02696, eq. 4).
    """

    num_layers: int = 10
    num_heads: int = 4
    ffn_dim: int = 1024
    long_batch: int = 16
    short_batch: int = 30
    learning_rate: float = 1e-3
    muon_learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.02
    decay_start: float = 0.4
    shifted_share: float = 0.7
    shift: float = 3.0
    caption_dropout: float = 0.1
    ema_power: float = 16.0

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "ffn_dim", "long_batch", "short_batch", "learning_rate"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for name in ("shifted_share", "caption_dropout"):
            _check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")


@dataclass(frozen=True)
class Recipe:
    """Everything that makes a pipeline from clips, besides the time it may take."""

    video: VideoRecipe = field(default_factory=VideoRecipe)
    autoencoder: AutoencoderRecipe = field(default_factory=AutoencoderRecipe)
    transformer: TransformerRecipe = field(default_factory=TransformerRecipe)
    seed: int = 0


PRESETS = {
    "full": Recipe(),
    # seconds on two CPU cores: shows that the whole program runs, the result is noise
    "smoke": Recipe(
        video=VideoRecipe(height=64, width=112, num_frames=9, short_frames=5, windows_per_caption=2),
        autoencoder=AutoencoderRecipe(
            base_dim=8,
            decoder_base_dim=8,
            dim_mult=(1, 2, 2),
            early=(Crops(1, 5, 32, 32), Crops(1, 9, 32, 32)),
            late=(Crops(1, 9, 32, 48),),
            lpips_frames=1,
            channels_last=False,
        ),
        transformer=TransformerRecipe(num_layers=2, num_heads=1, ffn_dim=64, long_batch=2, short_batch=2),
    ),
}
