"""Every knob of PLACE, its unit and its one default; no torch and no ray, so that `place --help` answers at once."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator


class UsageError(ValueError):
    """What a user asked for cannot be done as asked: one line on the screen, exit code 2."""


class RunError(ValueError):
    """A run, a data set or a checkpoint is not as it should be: one line on the screen, exit code 1."""


class PassingError(RunError):
    """What the next try may find as it should be, such as storage that did not answer; Ray's launcher makes one."""


class Section(BaseModel):
    """A strict, frozen group of knobs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


SectionT = TypeVar("SectionT", bound=Section)


class RunConfig(Section):
    dir: str = "runs/pretrain"
    """Run folder: configuration, metrics, checkpoints and evaluation go here."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the newest complete checkpoint in the run folder; `never` refuses a folder that has one."""
    seed: int = Field(0, ge=0)
    """Seed of initialisation, sample order, augmentation and dropout."""
    log_every_steps: int = Field(10, ge=1)
    """Optimiser steps between two lines of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    trackers: list[Literal["wandb", "mlflow"]] = []
    """Other places that get the figures; offline unless WANDB_MODE or MLFLOW_TRACKING_URI say otherwise."""
    profile_step: int | None = Field(None, ge=2)
    """First of the steps that torch's profiler and DeepSpeed's log of communication look into; none: no profile."""
    profile_steps: int = Field(3, ge=1)
    """How many steps these are; their traces go to the run folder's `profile`."""
    profile_ranks: list[int] = [0]
    """Ranks that are profiled."""
    time_phases: bool = False
    """Write into metrics.jsonl where the time of a step goes, and what its hosts sent (`place scale` does)."""
    probe: Literal["none", "synthetic", "loader"] = "none"
    """What is left out to find a limit: `synthetic` trains on one batch again and again, `loader` only reads."""


class AugmentConfig(Section):
    crop_scale_min: float = Field(0.8, gt=0, le=1)
    """Smallest area share of a random crop; 1 takes the centre crop."""
    rotation_deg: float = Field(5.0, ge=0, le=45)
    """Largest random rotation to either side, in degrees."""
    intensity: float = Field(0.1, ge=0, lt=1)
    """Largest relative change of brightness and of contrast."""


class StreamConfig(Section):
    path: str
    """Folder or s3://BUCKET/PREFIX written by `place prepare`."""
    repeat: float = Field(1.0, gt=0)
    """Times an epoch goes through this data set; a fraction draws anew in each epoch."""
    proportion: float | None = Field(None, gt=0)
    """Share of this data set in an epoch, which stays as long as all data sets together; for all of them or none."""


_SIZE = re.compile(r"\d+b?|(\d+|\d*\.\d+)\s*[kmgtpezy]b", re.IGNORECASE)
"""What streaming reads as a number of bytes."""


Sections = Literal["all", "findings", "impression", "one"]


class DataConfig(Section):
    path: str = "datasets/demo"
    """Folder or s3://BUCKET/PREFIX written by `place prepare`."""
    streams: tuple[StreamConfig, ...] = ()
    """Several prepared data sets in place of `path`, trained on together."""
    train_split: str = "train"
    """Split that is trained on."""
    val_split: str = "val"
    """Split that selects the best checkpoint; a name that the data set has not, such as none: nothing is validated."""
    image_size_px: int = Field(224, ge=16)
    """Side of the square image the model sees, in pixels; divisible by the patch size."""
    max_tokens: int = Field(160, ge=8)
    """Report tokens kept, special tokens included; the cut is at the end of a sentence where one fits. At most the
    positions of the report encoder, 512 for BERT; `scratch` makes as many as are asked for."""
    max_sentences: int = Field(16, ge=1)
    """Report sentences kept."""
    views_per_study: Literal["all", "one"] = "all"
    """`all`: each image of a study is a pair of the epoch; `one`: each study is, with an image drawn for the epoch."""
    sections: Sections = "all"
    """Report sections the text encoder reads; `one`: a report's findings or impression, drawn for the epoch, and its
    findings where nothing is trained."""
    shuffle_sentences: bool = False
    """Draw a new order of a report's sentences at each epoch."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of training images. There is no flip: reports say left and right."""
    num_workers: int = Field(2, ge=0)
    """Loader processes a training worker."""
    prefetch_batches: int = Field(2, ge=1)
    """Batches that a loader process holds ready."""
    predownload: int | None = Field(None, ge=1)
    """Samples whose shards a loader process fetches ahead; none takes eight batches."""
    num_canonical_nodes: int = Field(8, ge=1)
    """Streaming's canonical nodes: fixes the sample order for every world size. Keep it over the life of a run."""
    shuffle_block_size: int = Field(1 << 18, ge=1)
    """Samples in a shuffling block of streaming's py1e order. Keep it over the life of a run."""
    cache_dir: str | None = None
    """Node-local folder for unpacked shards; none takes the temporary folder. Emptied when the run ends."""
    cache_limit: str | None = None
    """Largest cache of unpacked shards a node and split, such as `200gb`; none keeps all."""

    @field_validator("cache_limit")
    @classmethod
    def _is_a_size(cls, limit: str | None) -> str | None:
        if limit is not None and not _SIZE.fullmatch(limit.strip()):
            raise ValueError("expected bytes, such as 200gb or 500mb")
        return limit

    @model_validator(mode="after")
    def _check_streams(self) -> DataConfig:
        weighted = [stream.proportion is not None for stream in self.streams]
        if any(weighted) and not all(weighted):
            raise ValueError("give proportion to all streams or to none")
        if any(weighted) and any(stream.repeat != 1 for stream in self.streams):
            raise ValueError("give the streams proportion or repeat, not both")
        return self

    def list_streams(self) -> tuple[StreamConfig, ...]:
        """The data sets that are read, one or several."""
        return self.streams or (StreamConfig(path=self.path),)


class VisionConfig(Section):
    source: str = "timm:vit_base_patch16_224"
    """`timm:NAME` (weights from the hub), a local folder (config.json, model.safetensors as of timm), or `scratch`."""
    architecture: str = "vit_base_patch16_224"
    """timm architecture that `scratch` builds with random weights."""
    overrides: dict[str, int | float] = {}
    """Arguments of the timm architecture, such as embed_dim, depth, num_heads, patch_size."""
    pooling: Literal["cls", "mean"] = "cls"
    """What stands for the image: the class token, or the mean of the patch tokens."""
    stem: Literal["patch", "conv"] = "patch"
    """`conv` puts four small convolutions in place of the linear patch projection; only with `scratch`."""


class TextConfig(Section):
    source: str = "emilyalsentzer/Bio_ClinicalBERT"
    """Hugging Face hub name, a folder with encoder and tokenizer, or `scratch` (both from the training reports)."""
    pooling: Literal["cls", "mean"] = "cls"
    """What stands for the report: its first token, or the mean of all real ones."""
    vocab_size: int = Field(2000, ge=64)
    """`scratch`: largest vocabulary of the WordPiece tokenizer."""
    width: int = Field(128, ge=8)
    """`scratch`: width of the encoder."""
    depth: int = Field(4, ge=1)
    """`scratch`: layers."""
    num_heads: int = Field(4, ge=1)
    """`scratch`: attention heads."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """`scratch`: dropout of the encoder; folders and hub names bring their own."""


class ObservationsConfig(Section):
    num_queries: int = Field(16, ge=1)
    """Learned pathology queries K."""
    depth: int = Field(2, ge=1)
    """Layers M of self-attention, cross-attention to the patches and feed-forward."""
    num_heads: int = Field(8, ge=1)
    """Attention heads."""


class CorrelationConfig(Section):
    depth: int = Field(1, ge=0)
    """Cross-attention blocks from patches to report tokens; 0 leaves the report out."""
    num_heads: int = Field(8, ge=1)
    """Attention heads."""
    width: int = Field(128, ge=8)
    """Width of z, whose patch correlation is trained."""
    mask_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of patches hidden from the image encoder; the loss, of pixels alone, counts pairs that touch one."""


class ModelConfig(Section):
    vision: VisionConfig = VisionConfig()
    """Image encoder."""
    text: TextConfig = TextConfig()
    """Report encoder."""
    observations: ObservationsConfig = ObservationsConfig()
    """Visual Pathology Observation Extractor (VPOE)."""
    correlation: CorrelationConfig = CorrelationConfig()
    """Head of the correlation exploration (CCE)."""
    joint_width: int = Field(512, ge=8)
    """Width E of the joint space."""
    attention: Literal["auto", "xformers", "sdpa", "eager"] = "auto"
    """Attention backend; `auto` takes xformers where it has an operator for device, precision and heads, else sdpa."""


class InstanceLossConfig(Section):
    weight: float = Field(1.0, ge=0)
    """Weight in the total; 0 switches the term off."""
    temperature: float = Field(0.07, gt=0)
    """Start of the learned temperature."""
    multi_positive: bool = True
    """Pairs with an identical report are positives of each other."""


class PathologyLossConfig(Section):
    weight: float = Field(1.0, ge=0)
    """Weight in the total; 0 switches the term off."""
    temperature: float = Field(0.07, gt=0)
    """Start of the learned temperature."""
    pairing: Literal["assignment", "soft", "max"] = "soft"
    """How a sentence finds its V-POR: one-to-one by least cost, by soft attention over all, or the most similar one."""
    negatives: Literal["study", "rank", "global"] = "global"
    """Where the other pairs come from."""
    mask_equal: bool = True
    """Pairs whose sentences are equal are not contrasted with each other."""
    search: float = Field(0.0, ge=0, lt=1)
    """Share of the search for sentences in all images of the global batch; the rest is the contrast of pairs."""


class CorrelationLossConfig(Section):
    weight: float = Field(1.0, ge=0)
    """Weight in the total; 0 switches the term off."""
    target: Literal["pixels", "features"] = "pixels"
    """Correlation that is regressed on: of raw pixel patches, or of the stop-gradient patch features."""
    normalize: bool = True
    """Pearson correlation; false takes the covariance."""
    distance: Literal["mse", "smooth_l1"] = "mse"
    """Distance between the two correlations."""
    beta: float = Field(0.1, gt=0)
    """Where smooth-L1 turns from square to linear."""
    method: Literal["auto", "tiled", "gram", "reference"] = "auto"
    """How it is computed: fused tiles, without N x N matrices (mse only), plain torch, or by shape (auto)."""

    @field_validator("method")
    @classmethod
    def _fits_the_distance(cls, method: str, info: ValidationInfo) -> str:
        if method == "gram" and info.data.get("distance") != "mse":
            raise ValueError("gram computes distance=mse only; use auto")
        return method


class TokenLossConfig(Section):
    weight: float = Field(0.0, ge=0)
    """Weight in the total; 0 leaves the term and its projections out."""
    attention_scale: float = Field(4.0, gt=0)
    """Inverse temperature of a word's attention over the patches."""
    word_scale: float = Field(5.0, gt=0)
    """Inverse temperature at which the words of a report are summed up."""
    logit_scale: float = Field(10.0, gt=0)
    """Inverse temperature of the contrast between studies."""


class LossConfig(Section):
    instance: InstanceLossConfig = InstanceLossConfig()
    """Instance alignment (ITA)."""
    pathology: PathologyLossConfig = PathologyLossConfig()
    """Pathological-level cross-modal alignment (PCMA)."""
    correlation: CorrelationLossConfig = CorrelationLossConfig()
    """Correlation exploration (CCE)."""
    tokens: TokenLossConfig = TokenLossConfig()
    """Token-wise alignment as of GLoRIA: a baseline, not part of PLACE."""
    max_logit_scale: float = Field(100.0, gt=1)
    """Largest inverse temperature."""

    @model_validator(mode="after")
    def _optimise_something(self) -> LossConfig:
        if not any(term.weight for term in (self.instance, self.pathology, self.correlation, self.tokens)):
            raise ValueError("all weights are 0; give instance, pathology, correlation or tokens one above 0")
        return self


class OptimConfig(Section):
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate at `base_batch`."""
    base_batch: int = Field(1024, ge=1)
    """Global batch at which `lr` holds."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "sqrt"
    """How the learning rate follows the global batch."""
    min_lr_ratio: float = Field(0.01, ge=0, le=1)
    """Last learning rate over the peak."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's averaging."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.05, ge=0)
    """Decay of weights; norms, biases, temperatures, position embeddings and queries have none."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps with a rising learning rate."""
    clip_norm: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""


class TrainConfig(Section):
    global_batch: int = Field(1024, ge=2)
    """Image-report pairs an optimiser step contrasts, over all workers."""
    accumulation: int = Field(1, ge=1)
    """Least number of chunks a worker's share is cut into (GradCache: the loss still sees the whole global batch)."""
    max_micro_batch: int | None = Field(None, ge=1)
    """Most pairs a worker holds at once: a larger share is cut into more chunks, at each world size; none: no limit."""
    epochs: int = Field(50, ge=1)
    """Passes over the training split."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many steps; the schedule is laid over them."""
    evaluate_every_epochs: int = Field(1, ge=1)
    """Epochs between two looks at the validation split."""
    max_val_batches: int = Field(50, ge=1)
    """Global batches of the validation split looked at."""
    checkpoint_every_steps: int = Field(500, ge=1)
    """Steps between two checkpoints; one more is written at the end and on a signal."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept, beside the best."""


OWNED_BY = {
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "torch_autocast": "engine.precision",
    "optimizer": "optim",
    "scheduler": "optim",
    "gradient_clipping": "optim.clip_norm",
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.max_micro_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "zero_optimization.stage": "engine.zero_stage",
}
"""Raw DeepSpeed keys that would contradict what the rest of PLACE believes, and the knob to turn instead."""


class EngineConfig(Section):
    kind: Literal["deepspeed", "torch"] = "deepspeed"
    """DeepSpeed, or plain torch with averaged gradients."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16 and fp16 are torch autocast over fp32 parameters, fp16 with a dynamic loss scale; losses are fp32 always."""
    compile: bool = False
    """torch.compile for the encoders; not with ZeRO 3. Packed reports only where torch's flash attention runs (CUDA,
    half precision, no dropout of attention weights)."""
    activation_checkpointing: bool = False
    """Recompute the encoders' activations in the backward pass."""
    wire_precision: Literal["fp32", "bf16"] = "fp32"
    """DeepSpeed: precision in which workers exchange gradients; with ZeRO 3 and precision=bf16 also parameters."""
    bucket_mib: int = Field(100, ge=1)
    """DeepSpeed: gradients (fp32) reduced in one message, and parameters that ZeRO 3 fetches ahead, in MiB."""
    overlap_comm: bool = True
    """DeepSpeed: reduce gradients while the backward pass goes on (GPUs only)."""
    gradient_reduction: Literal["all_reduce", "reduce"] = "all_reduce"
    """ZeRO 1 and 2: all-reduce whole buckets, or reduce each part to its owner: a third less bytes, more messages."""
    hierarchical_gather: bool = True
    """ZeRO 3 over nodes of several GPUs: each node keeps a whole copy, from which the backward pass gathers."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """ZeRO: `optimizer` keeps its state in host memory and steps there; `all`, with ZeRO 3, the parameters too."""
    deepspeed: dict[str, Any] = {}
    """Raw DeepSpeed keys merged over ours."""

    @field_validator("compile")
    @classmethod
    def _check_compile(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("kind") == "deepspeed" and info.data.get("zero_stage") == 3:
            raise ValueError("parameters of ZeRO 3 come and go inside the encoders; set engine.zero_stage=0, 1 or 2")
        return value

    @field_validator("offload")
    @classmethod
    def _check_offload(cls, value: str, info: ValidationInfo) -> str:
        stage = info.data.get("zero_stage", 0) if info.data.get("kind") == "deepspeed" else 0
        if (value == "optimizer" and stage < 1) or (value == "all" and stage < 3):
            raise ValueError(f"needs engine.kind=deepspeed and engine.zero_stage={1 if value == 'optimizer' else 3}")
        return value

    @field_validator("precision")
    @classmethod
    def _check_precision(cls, value: str, info: ValidationInfo) -> str:
        if value == "fp16" and info.data.get("kind") == "deepspeed" and info.data.get("zero_stage") == 0:
            raise ValueError("fp16 needs engine.zero_stage=1 to 3, or engine.kind=torch")
        return value

    @field_validator("deepspeed")
    @classmethod
    def _check_raw(cls, value: dict[str, Any]) -> dict[str, Any]:
        given = [*value, *(f"zero_optimization.{key}" for key in value.get("zero_optimization", {}))]
        for key in given:
            if key in OWNED_BY:
                raise ValueError(f"set {OWNED_BY[key]} instead of the raw key {key}")
        return value


class ClusterConfig(Section):
    launcher: Literal["ray", "local", "torchrun"] = "ray"
    """Who starts the workers; `local` is one worker in this process, `torchrun` takes what torchrun set."""
    num_workers: int = Field(1, ge=1)
    """Training workers over the whole cluster, one a GPU where there are any."""
    num_nodes: int | None = Field(None, ge=1)
    """Ray: nodes that they lie on, equally many on each; none takes as few as hold them where there are GPUs, else as
    many as there are. Where `min_nodes` lets a run go on with fewer workers, it is chosen so too."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores a worker reserves."""
    max_failures: int = Field(3, ge=0)
    """Ray: failures in a row, without a new checkpoint between them, that the run survives; one more ends it."""
    start_timeout_s: int = Field(300, ge=0)
    """Longest wait for all nodes of a standing cluster at the start, in seconds."""
    rejoin_timeout_s: int = Field(60, ge=0)
    """Ray: longest wait for a lost node to come back, in seconds; then see `min_nodes`."""
    min_nodes: int | None = Field(None, ge=1)
    """Ray: go on with fewer workers on at least so many nodes, at the same global batch; none ends the run."""
    grow_after_s: int = Field(60, ge=1)
    """A run that goes on with fewer workers restarts with more once nodes have been back for so long, in seconds."""
    hang_timeout_s: int = Field(600, ge=1)
    """Longest step, with its wait for the checkpoint before, in seconds; then every rank writes its stacks to
    RUN/stacks and ends, and Ray's launcher starts them again."""
    timeout_s: int = Field(1800, ge=10)
    """Longest wait in a collective, in seconds."""
    bind_cores: bool = True
    """On nodes with GPUs, give each worker cores of its own, of one CPU socket where they divide."""


class GenerationConfig(Section):
    sections: Sections | None = None
    """What of a report is learned and judged (`one`: the findings, else the impression); none takes what the run read,
    for other encoders all. Give one where encoders are compared."""
    decoder: str | None = None
    """Folder of a causal language model (GPT-2 or BERT) with tokenizer that writes; none trains a small GPT-2."""
    width: int = Field(128, ge=8)
    """Width of the small decoder."""
    depth: int = Field(2, ge=1)
    """Layers of the small decoder."""
    num_heads: int = Field(4, ge=1)
    """Attention heads of the small decoder; they divide its width."""
    max_words: int = Field(80, ge=1)
    """Longest report that is learned or written, in words and stops (in tokens, with `decoder`)."""
    steps: int = Field(1500, ge=1)
    """Training steps: the budget of time, counted so that the same seed writes the same reports."""
    batch_size: int = Field(16, ge=1)
    """Reports a training step sees."""
    lr: float = Field(2e-3, gt=0)
    """Peak learning rate."""
    max_train: int = Field(4000, ge=1)
    """Training images, the first by hash; their tokens are held in memory."""
    beams: int = Field(3, ge=1)
    """Beams of the search."""
    chexbert: str | None = None
    """Folder with `chexbert.pth` and the config.json and tokenizer of bert-base-uncased: F1 by CheXbert as well."""
    radgraph: str | None = None
    """Folder of a RadGraph model, called `radgraph`, `radgraph-xl` or `modern-radgraph-xl`, with weights.th: RadGraph
    F1 as well."""
    seed: int = 0
    """Seed of weights and batches."""

    @field_validator("num_heads")
    @classmethod
    def _divides_the_width(cls, num_heads: int, info: ValidationInfo) -> int:
        width = info.data.get("width", num_heads)
        if width % num_heads:
            raise ValueError(f"must divide width={width}")
        return num_heads


class HeadConfig(Section):
    """How a head on frozen tokens is trained, whatever it learns."""

    max_steps: int = Field(ge=1)
    """Most training steps."""
    look_every_steps: int = Field(50, ge=1)
    """Steps between two looks at the validation split; where `max_steps` are fewer, one look after the last."""
    patience: int = Field(4, ge=1)
    """Looks at the validation split in vain after which training stops."""
    batch_size: int = Field(ge=1)
    """Images a step."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate."""
    weight_decay: float = Field(1e-4, ge=0)
    """Decay of weights."""
    seed: int = Field(0, ge=0)
    """Seed of weights and batches."""


class SegmentationConfig(HeadConfig):
    max_steps: int = Field(600, ge=1)
    """Most training steps."""
    batch_size: int = Field(32, ge=2)
    """Images a step."""


class DetectionConfig(HeadConfig):
    max_steps: int = Field(400, ge=1)
    """Most training steps."""
    batch_size: int = Field(16, ge=1)
    """Images a step."""


class FinetuneConfig(Section):
    max_steps: int = Field(2000, ge=1)
    """Most training steps with each subset of the labels."""
    patience: int = Field(4, ge=1)
    """Looks at the validation split in vain after which training stops; a look an epoch, of 25 to 250 steps."""
    batch_size: int = Field(32, ge=2)
    """Images a step."""
    lr: float = Field(5e-4, gt=0)
    """Learning rate of the last layer."""
    layer_decay: float = Field(0.75, gt=0, le=1)
    """Factor on the learning rate from a layer to the one before it."""
    weight_decay: float = Field(0.05, ge=0)
    """Decay of weights; norms, biases, class tokens and position embeddings have none."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of training images."""
    seed: int = 0
    """Seed of the last layer, batches and augmentation."""


class EvaluationConfig(Section):
    gallery_size: int | None = Field(None, ge=2)
    """Unique reports in the retrieval gallery, the first by hash; none takes all."""
    bootstrap: int = Field(1000, ge=0)
    """Resamples behind a confidence interval."""
    batch_size: int = Field(64, ge=1)
    """Studies encoded at once."""
    num_workers: int = Field(1, ge=1)
    """Tasks judged at once on CPU cores, each in a process with its share of them and memory of its own; on a GPU one
    after the other."""
    occlusion: bool = False
    """grounding: also a map of where the cosine falls if patches are hidden, a pass of the encoder for each patch."""
    prompts: str | None = None
    """YAML of `finding: {positive: [...], negative: [...]}`; none takes the prompts built in."""
    label_shares: tuple[float, ...] = (0.01, 0.1, 1.0)
    """classification, finetune: shares of the training patients whose labels are seen."""
    label_subsets: int = Field(3, ge=1)
    """classification, finetune: random subsets of patients behind each share below 1."""
    segmentation_head: Literal["setr", "upernet"] = "setr"
    """segmentation, finetune_segmentation: head on the patch tokens, SETR-PUP (as MGCA) or UperNet (as BenchX)."""
    max_train_images: int | None = Field(2000, ge=1)
    """segmentation, finetune_segmentation, detection: most training images, the first by hash; none takes all."""
    folds: int = Field(0, ge=0)
    """segmentation, finetune_segmentation, detection: folds of patients over all splits, 3 or more; 0 judges one split
    alone."""
    allow_leaks: list[str] = []
    """Overlaps that are allowed, and then written into the results, such as pretraining.image."""
    pretraining: list[str] = []
    """Folders of the pretraining data that the judged images may not overlap with; empty takes those of the run."""
    other_tests: list[str] = []
    """Folders of other prepared data sets, whose test images may not be among those judged or trained on here."""
    id_map: str | None = None
    """csv of two columns, each row two names of one image, as their data sets' tables have them, or the JSON that RSNA
    publishes: re-encoded copies."""
    salt_file: str | None = None
    """id_map: the secret that the data sets were prepared with; none takes ~/.config/place/salt."""
    findings: list[str] = []
    """Findings that count towards the mean; empty takes all labels of the data set."""
    segmentation: SegmentationConfig = SegmentationConfig()
    """segmentation: how the head on frozen tokens is trained."""
    detection: DetectionConfig = DetectionConfig()
    """detection: how the detector on frozen tokens is trained."""
    generation: GenerationConfig = GenerationConfig()
    """generation: the decoder that writes reports."""
    finetune: FinetuneConfig = FinetuneConfig()
    """finetune, finetune_segmentation: how the whole encoder is trained."""

    @field_validator("label_shares")
    @classmethod
    def _are_shares(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if not shares or not all(0 < share <= 1 for share in shares):
            raise ValueError("expected shares above 0 and up to 1")
        return shares


class Config(Section):
    """A pretraining run."""

    run: RunConfig = RunConfig()
    """Run folder and logging."""
    data: DataConfig = DataConfig()
    """What is trained on."""
    model: ModelConfig = ModelConfig()
    """What is trained."""
    loss: LossConfig = LossConfig()
    """What is optimised."""
    optim: OptimConfig = OptimConfig()
    """How it is optimised."""
    train: TrainConfig = TrainConfig()
    """How long, and in which batches."""
    engine: EngineConfig = EngineConfig()
    """Numerics and sharding."""
    cluster: ClusterConfig = ClusterConfig()
    """Where it runs."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How the encoder is judged."""

    @field_validator("loss")
    @classmethod
    def _hides_what_is_predicted(cls, loss: LossConfig, info: ValidationInfo) -> LossConfig:
        is_hiding = "model" in info.data and info.data["model"].correlation.mask_ratio > 0
        if is_hiding and loss.correlation.weight and loss.correlation.target == "features":
            raise ValueError(
                "with patches hidden, correlation.target=features are those of the rest; "
                "set loss.correlation.target=pixels or model.correlation.mask_ratio=0"
            )
        return loss


SourceName = Literal[
    "phantom", "csv", "folder", "mimic-cxr", "mimic-cxr-jpg", "openi", "dicom-tree", "r2gen-json", "table"
]


class PrepareConfig(Section):
    """What `place prepare` is told."""

    source: SourceName
    """Where studies come from."""
    output: str
    """Folder the prepared data set is written to, shared by all hosts, or s3://BUCKET/PREFIX."""
    input: str | None = None
    """csv: the table (csv, tsv or parquet), one row an image. folder: CLASS/*.png, or SPLIT/CLASS/*.png. Others: the
    folder of the download, or of DICOM files."""
    protocol: str | None = None
    """File of configs/eval: gives source, options and layout of a data set, and the counts that must be met."""
    allow_counts: tuple[str, ...] = ()
    """Counts of the protocol that may differ, such as test.images; the card then says so."""
    image_root: str | None = None
    """csv, openi, r2gen-json: folder that image paths are relative to."""
    reports: str | None = None
    """dicom-tree: table of reports. openi, mimic-cxr: folder of reports. None looks in the input folder."""
    columns: dict[str, str] = {}
    """csv: our field (image, text, findings, impression, patient, study, view, split) to the table's column.
    dicom-tree: accession, study, text, findings, impression, patient or split to the column of the reports."""
    label_columns: tuple[str, ...] = ()
    """csv, dicom-tree, mimic-cxr: columns with 1 positive, 0 negative, -1 uncertain, empty unknown; or text classes,
    one-hot by class."""
    count: int = Field(2000, ge=1)
    """phantom: studies made."""
    seed: int = Field(0, ge=0)
    """phantom: seed of the studies; all sources: seed of the split."""
    phantom_format: Literal["jpeg", "dicom"] = "jpeg"
    """phantom: image format that is read back."""
    size_px: int = Field(256, ge=16)
    """Short side of the stored image, in pixels; smaller images keep their size."""
    jpeg_quality: int = Field(95, ge=1, le=100)
    """Quality of the stored grey JPEG."""
    masks: dict[str, str] | None = None
    """csv: finding to the path of its mask file from the image root; {stem} is the image's path without suffix."""
    boxes: str | None = None
    """mimic-cxr: table of phrases with boxes, MS_CXR_Local_Alignment_v1.1.0.csv."""
    only: str | None = None
    """mimic-cxr: table with a column dicom_id; its images alone are kept, all as test split: a published test set."""
    views: tuple[str, ...] = ()
    """Views that are kept, such as FRONTAL, LATERAL, UNKNOWN, ALL. None keeps the frontal ones, and of csv, folder,
    openi, r2gen-json and table also the unknown."""
    case: Literal["keep", "lower"] = "keep"
    """Letters of the stored report: as written, or all small."""
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of patients in train, val and test; a split column comes first."""
    min_words: int = Field(3, ge=0)
    """Reports with fewer words are rejected; 0 keeps images without a report, for tasks that need none (folder: 0)."""
    launcher: Literal["ray", "local"] = "ray"
    """Who spreads the work: Ray, or processes of this host without it. The result is the same."""
    address: str | None = None
    """Ray cluster to work on; none takes RAY_ADDRESS, or starts a Ray on this host."""
    num_workers: int = Field(0, ge=0)
    """Processes; 0 takes one a core of all hosts."""
    rows_per_task: int = Field(512, ge=1)
    """Rows a task turns into one finished part; a killed run loses at most the parts under way."""
    shard_mib: int = Field(32, ge=1)
    """Largest MDS shard before compression, in MiB."""
    salt_file: str | None = None
    """File with the secret that ids are hashed with; none takes (or makes, mode 600) ~/.config/place/salt."""

    @model_validator(mode="before")
    @classmethod
    def _asks_no_report_of_folders(cls, given: Any) -> Any:
        without = isinstance(given, dict) and given.get("source") == "folder"
        return {"min_words": 0, **given} if without else given

    @field_validator("split")
    @classmethod
    def _shares_out(cls, shares: tuple[float, float, float]) -> tuple[float, float, float]:
        if not (all(0 <= share < math.inf for share in shares) and sum(shares) > 0):
            raise ValueError("expected three shares from 0 up, one of them above 0")
        return shares


def build_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file (with at most one `extends`), lay dotted overrides over it and check every key.

    Args:
        path: YAML file; none starts from the defaults.
        overrides: `section.key=value` strings, values in YAML syntax.
    Raises:
        UsageError: unreadable file, unknown key (with the nearest name) or a value out of range.
    Source: ours.
    """
    tree = read_tree(Path(path)) if path else {}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"'{item}' is no override: write it as section.key=value")
        _set_dotted(tree, key, _parse_yaml(value, item))
    return check_config(tree)


def check_config(tree: dict[str, Any]) -> Config:
    """Turn a nested dict into a `Config`. Raises UsageError, one line for the first fault."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_first_fault(error)) from None


def read_section(path: Path, kind: type[SectionT]) -> SectionT:
    """A YAML file that is one section, every key checked. Raises UsageError, one line for the first fault."""
    try:
        return kind.model_validate(read_tree(path))
    except ValidationError as error:
        fault = error.errors()[0]
        raise UsageError(f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg'].lower()}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def read_tree(path: Path, depth: int = 0) -> dict[str, Any]:
    """A YAML file of sections, laid over what it `extends`, unchecked. Raises UsageError, in one line."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UsageError(f"config {path}: {error.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise UsageError(f"config {path}: not text in UTF-8; give the path of a YAML file, saved as UTF-8") from None
    tree = _parse_yaml(text, str(path)) or {}
    if not isinstance(tree, dict):
        raise UsageError(f"config {path}: expected sections, got {type(tree).__name__}")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UsageError(f"config {path}: extends={base!r}; expected the path of one YAML file")
    if depth:
        raise UsageError(f"config {path}: a base may not extend another one; only one `extends` is allowed")
    return merge_trees(read_tree(path.parent / base, depth + 1), tree)


def _parse_yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not YAML ({str(error).splitlines()[0]})") from None
    except ValueError as error:  # a date that there is not, such as 2024-13-01
        raise UsageError(f"{where}: no value of YAML ({error}); put quotes around what is text") from None


def merge_trees(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A nested dict laid over another one, key by key; what is no dict in both is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge_trees(merged[key], value) if both else value
    return merged


def _set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UsageError(f"{key}: '{section}' is a value, not a section")
    tree[last] = value


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] != "extra_forbidden":
        return f"{where}: {fault['msg'].lower()}, got {fault['input']!r}"
    near = difflib.get_close_matches(where, _known_keys(Config), n=1, cutoff=0.4)
    return f"unknown config key '{where}'" + (f"; did you mean '{near[0]}'?" if near else "")


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys
