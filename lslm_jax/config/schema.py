"""Every setting of a run, as frozen, typed dataclasses. Defaults live here and nowhere else.

The string under a field is its documentation; `--config.help` prints it. `loading.py` reads files and flags into
a Config, `validation.py` refuses impossible ones. None of the three imports anything slow, so that a mistake is told
before jax or tensorflow start.
"""

from dataclasses import dataclass, field
from typing import Literal

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Roles in conversations."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The Transformer. GPT, Llama, BERT and T5 are sets of values (`models/model_configs.py`), not branches of code."""

    family: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    """Which stacks there are: one that sees only what is before it (GPT), one that sees all (BERT), or both (T5)."""
    num_layers: int = 12
    """Transformer blocks, L, of each stack."""
    num_decoder_layers: int = 0
    """Blocks of an encoder-decoder's decoder. 0: num_layers."""
    d_model: int = 768
    """Width of the residual stream, D."""
    num_heads: int = 12
    """Query heads, H."""
    num_kv_heads: int = 0
    """Key and value heads, K; fewer than num_heads is grouped-query attention. 0: as many as num_heads."""
    head_dim: int = 0
    """Width of one head, C. 0: d_model / num_heads."""
    d_ff: int = 0
    """Width of the MLP, F, or of each expert. 0: 4 * d_model."""
    vocab_size: int = 0
    """Tokens of the vocabulary, V. 0: as many as the tokenizer has."""
    num_labels: int = 0
    """Classes, or tags, that a head tells apart. 0: as many as the prepared data have."""
    token_types: int = 0
    """Rows of a table that tells first from second text of a pair (BERT has 2). 0: no table."""
    max_length: int = 1024
    """Longest sequence, source or target: the size of a position table, and the limit of generation."""
    positions: Literal["learned", "rotary", "sinusoidal", "relative"] = "learned"
    """A learned table (GPT, BERT), rotated queries and keys (Llama), a fixed table of waves, or T5's relative bias."""
    position_offset: int = 0
    """Rows of the learned table before that of the first position (RoBERTa has 2); they are never read."""
    rope_theta: float = 10_000.0
    """Base wavelength of the rotary positions."""
    rope_local_theta: float = 0.0
    """The same in layers that see a window (Gemma 3, ModernBERT), where nothing is stretched. 0: as in the others."""
    rope_fraction: float = 1.0
    """Share of each head's features that are rotated (GPT-NeoX: 0.25)."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """Stretches wavelengths for longer texts: all of them, or only those that a text of the old length cannot hold."""
    rope_factor: float = 1.0
    """By how much they are stretched."""
    rope_low_factor: float = 1.0
    """llama3: wavelengths above rope_original_length / this are stretched."""
    rope_high_factor: float = 4.0
    """llama3: wavelengths below rope_original_length / this stay; those in between are stretched in part."""
    rope_original_length: int = 8192
    """llama3: how long texts were before."""
    relative_buckets: int = 32
    """Distances that relative positions tell apart, of both directions together where a token sees both."""
    relative_distance: int = 128
    """From here on all distances share the last bucket."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of normalisation."""
    norm_place: Literal["before", "after", "output", "both"] = "before"
    """Before each sub-layer (Llama), after each sum (BERT), on each output (OLMo 2), or before and on it (Gemma 2)."""
    norm_offset: bool = False
    """Whether scales are learnt as their distance from 1 (Gemma)."""
    first_norm: bool = True
    """Whether the first layer normalises what its attention reads; after embed_norm it need not (ModernBERT)."""
    embed_norm: bool = False
    """Whether embeddings are normalised before the first block (BERT)."""
    embed_scale: bool = False
    """Whether embeddings are multiplied by sqrt(D) (Transformer of 2017)."""
    norm_eps: float = 1e-5
    """Added to the variance before its root."""
    activation: Literal["gelu", "gelu_exact", "relu", "relu2", "silu"] = "gelu"
    """Non-linearity of the MLP; `gelu` is the tanh approximation, `relu2` the squared ReLU."""
    gated: bool = False
    """Whether the MLP multiplies the activation with a second projection (SwiGLU is silu, gated)."""
    num_experts: int = 0
    """MLPs of a block, E, of which each token goes through a few (mixture of experts). 0: one, for all tokens."""
    experts_per_token: int = 2
    """How many experts a token goes through: the likeliest of a softmax over all."""
    expert_normalize: bool = True
    """Whether their probabilities are made to add up to 1 (Mixtral)."""
    shared_experts: int = 0
    """Experts that all tokens go through besides (DeepSeek), as one MLP of width shared_experts * d_ff."""
    expert_capacity: float = 0.0
    """Most tokens of a row that one takes, relative to its even share; the rest pass it by (Switch). 0: no limit."""
    bias: bool = True
    """Whether projections and LayerNorm have biases."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases where nothing else has (Qwen 2)."""
    output_bias: bool = False
    """Whether the output layer over the vocabulary has a bias (BERT, Marian)."""
    parallel: bool = False
    """Whether attention and MLP read the same residual stream, and are added together (GPT-NeoX)."""
    tie_embeddings: bool = True
    """Whether the output layer is the embedding transposed."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """Whether queries and keys are RMS-normalised before their product: each head alone, or all at once (OLMo 2)."""
    window: int = 0
    """Sliding-window attention: a token sees itself and the window - 1 before it; in encoders also after. 0: all."""
    layer_types: tuple[Literal["full", "window", "no_rope"], ...] = ()
    """What layers see, over and over: all, the window, all without rotary positions. (): the window if there is one."""
    attention_scale: float = 0.0
    """What products of query and key are multiplied with. 0: 1 / sqrt(C). T5 has 1: its initial weights do the rest."""
    attention_softcap: float = 0.0
    """Squash products of query and key smoothly into (-cap, cap) (Gemma 2). 0: off."""
    logit_scale: bool = False
    """Whether the final hidden state is divided by sqrt(D) before the output layer (T5 1.0)."""
    logit_softcap: float = 0.0
    """Squash output logits smoothly into (-cap, cap). 0: off."""
    dropout: float = 0.0
    """Rate of dropout on embeddings and on each sub-layer's output, in training."""
    init: Literal["normal", "residual", "fan_in"] = "residual"
    """Weights N(0, 0.02); the same, but smaller by sqrt(2 L) into the residual stream (GPT-2); or N(0, 1 / fan-in)."""
    pool: Literal["first", "mean"] = "first"
    """What a whole-text head reads: the first token, or the mean of all."""
    head_activation: Literal["tanh", "relu", "gelu_exact"] = "tanh"
    """Non-linearity of a whole-text head (BERT tanh, DistilBERT relu)."""
    head_norm: bool = False
    """Whether heads have a dense layer with a norm for tokens, too (ModernBERT); else texts alone have one, without."""
    lora_rank: int = 0
    """Rank of low-rank adapters beside projections (LoRA); they are then trained alone, with heads. 0: none."""
    lora_alpha: float = 16.0
    """What adapters say is multiplied with this / lora_rank."""
    lora_targets: tuple[str, ...] = ("*",)
    """Projections of a block that have one, by pattern: `attention.q`, `attention.*`, `mlp.*`, `cross.*`."""
    dtype: Literal["float32", "bfloat16", "float8", "int8"] = "float32"
    """Type of activations and matrix products; float8, int8: of blocks' products alone, and bfloat16 else (qwix)."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention kernel: `xla` anywhere, `cudnn` on GPUs, `splash` on TPUs, `auto` the fastest that is correct."""
    scan_layers: Literal["auto", True, False] = "auto"
    """Scan one compiled block over the layers, or compile each; auto: each if up to 16, weights whole and no TPU."""
    remat: Literal["none", "full", "dots", "save_attention"] = "none"
    """What the backward pass recomputes: nothing, blocks, all but matrix products, or all but these and attention."""
    microbatches: int = 0
    """Parts of a batch that flow through the stages of mesh.stage. 0: 4 a stage, or as many below as divide rows."""
    pipeline_rounds: int = 1
    """How often each part passes through all stages: more leave them less idle, but layers then move at each step."""

    @property
    def activations(self) -> str:
        """Type of what lies between products."""
        return "bfloat16" if self.dtype in ("float8", "int8") else self.dtype


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from. `DataConfig` is one; a mixture is several."""

    source: Literal["files", "tfds", "shards", "synthetic"] = "files"
    """Files, a TFDS data set, token shards prepared before (in data.dir), or random tokens for benchmarks."""
    files: tuple[str, ...] = ()
    """Files, folders, globs: .jsonl .json .csv .tsv .parquet .arrow, text (pairs: two by two); .gz .zst .bz2 .xz."""
    tfds: str = ""
    """TFDS data set, as `lm1b` or `c4/en:3.0.1`."""
    data_dir: str = ""
    """Where TFDS keeps its data. Empty: TFDS's own default."""
    split: str = "train"
    """TFDS split to train on, with TFDS's slicing (`train[:90%]`)."""
    example: Literal["text", "pair", "label", "tags", "qa", "chat"] = "text"
    """A text, source and target, a text and its label, words and their tags, question and context, a conversation."""
    text_key: str = "text"
    """Field, column or TFDS feature that holds the text (chat: the list of messages); see a table's header."""
    target_key: str = ""
    """That of a pair's target, a labelled text's second, the answer to a text (chat). Plain text pairs: see `files`."""
    input_key: str = ""
    """Optional field put after the text of an instruction (chat with target_key), as Alpaca's `input`."""
    roles: tuple[str, ...] = ()
    """Other names of roles in conversations, as `customer=user,agent=assistant`."""
    label_key: str = "label"
    """That of a label, or of the tags, one for each word."""
    labels: tuple[str, ...] = ()
    """Names of labels or tags in the order of their numbers. Empty: TFDS's, or those found in training data, sorted."""
    prefix: str = ""
    """Put before each source text, to say what is asked (T5), as `translate English to German: `."""
    document: Literal["file", "line"] = "file"
    """Unit of a plain text file that makes one document, unless separator is set."""
    separator: str = ""
    """Text between the documents of a plain text file, as `<|endoftext|>`; `blank_line`: lines without text."""
    valid_files: tuple[str, ...] = ()
    """Files held out for validation."""
    valid_fraction: float = 0.0
    """Share of the documents held out, at least one, by a hash of their text; of fewer text files the end of each."""
    valid_split: str = ""
    """TFDS split to validate on."""
    test_files: tuple[str, ...] = ()
    """Files for `evaluate --split=test`, which training never looks at."""
    test_split: str = ""
    """TFDS split for `evaluate --split=test`."""


@dataclass(frozen=True, kw_only=True)
class MixtureSource(Source):
    """One source of a mixture."""

    name: str
    """What it is called in the data directory and in metrics."""
    weight: float = 1.0
    """Its share of the rows, relative to the other weights."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Source):
    """What is trained on, and how documents become rows."""

    mixture: tuple[MixtureSource, ...] = ()
    """Several sources, mixed by weight, in place of the one above; written in the config file."""
    dir: str = ""
    """Where the prepared shards are or will be. Empty: WORKDIR/data."""
    seq_len: int = 1024
    """Tokens a row, T; of an encoder-decoder, of the target."""
    source_len: int = 0
    """Tokens of an encoder-decoder's source row, S. 0: seq_len."""
    packing: Literal["stream", "bins", "pad"] = "stream"
    """`stream`: document after document, cut at row ends; `bins`: pieces packed whole into rows; `pad`: one a row."""
    mask_documents: bool = True
    """Whether attention is kept within each document of a row."""
    chat_template: str = ""
    """Jinja file that puts conversations into words, as Hugging Face has them. Empty: the vocabulary's own."""
    max_documents: int = 0
    """Read at most so many documents of each source. 0: all."""
    verify: bool = True
    """Whether training first reads all shards and compares their sha256, about 1 GB/s; sizes are compared anyway."""
    shard_tokens: int = 1 << 26
    """Tokens in one shard file."""

    @property
    def is_chat(self) -> bool:
        """Whether examples are conversations; those of a mixture are all of one kind then."""
        return any(source.example == "chat" for source in self.mixture or (self,))


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is learnt from an example."""

    objective: Literal[
        "causal", "masked", "span_corruption", "seq2seq", "classification", "regression", "tagging", "qa"
    ] = "causal"
    """Next token, masked tokens (BERT), spans (T5), target from source; a head's class, number, tags, answer span."""
    multi_label: bool = False
    """Multi-label classification: a sigmoid for each class. For pretrained classifiers; not trained or scored."""
    mask_rate: float = 0.15
    """Share of tokens that are masked, or lie in corrupted spans."""
    whole_words: bool = False
    """Whether all tokens of a word are masked together."""
    span_length: float = 3.0
    """Mean length of a corrupted span, in tokens."""
    stride: int = 128
    """Tokens by which windows over a context too long for a row move on (qa)."""
    max_answer: int = 30
    """Longest answer, in tokens (qa)."""
    null_threshold: float = 0.0
    """A question counts as unanswerable if that scores more than the best answer by over so much (qa)."""


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """What is done to text before anything else sees it. Every dropped document is counted by reason."""

    unicode: Literal["none", "NFC", "NFD", "NFKC", "NFKD"] = "NFC"
    """Unicode normalisation form."""
    control: Literal["keep", "strip"] = "strip"
    """What becomes of control characters other than tab and newline."""
    whitespace: Literal["keep", "trim", "collapse"] = "keep"
    """`trim`: no blanks at line ends or around the document; `collapse`: also single spaces, at most one empty line."""
    min_chars: int = 1
    """Shorter documents are dropped."""
    max_chars: int = 0
    """Longer documents are dropped. 0: no limit."""
    bad_utf8: Literal["strict", "replace", "skip"] = "strict"
    """On undecodable bytes: stop with their place, put U+FFFD there, or drop the document."""
    bad_records: Literal["strict", "skip"] = "strict"
    """On records that lack a field or are not of their format: stop with their place, or drop and count them."""
    deduplicate: Literal["none", "exact", "near"] = "exact"
    """Drop documents equal to an earlier one, or also the near ones (MinHash: 0.8 of their word 5-grams in common)."""
    deduplicate_over: Literal["source", "mixture"] = "source"
    """Compare a mixture's training documents with those of their own source, or of all. Held-out ones always count."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The vocabulary."""

    kind: Literal["sentencepiece", "bytes", "huggingface", "marian"] = "sentencepiece"
    """SentencePiece, one token a UTF-8 byte, a Hugging Face tokenizer.json, or Marian's source.spm and its kin."""
    path: str = ""
    """A .model, tokenizer.json or source.spm to use. Empty: train SentencePiece on the training documents."""
    model: Literal["unigram", "bpe"] = "bpe"
    """Algorithm of a trained vocabulary."""
    vocab_size: int = 8192
    """Size of a trained vocabulary, at most: a small text may support fewer tokens."""
    character_coverage: float = 0.9995
    """Share of the characters of the text that a trained vocabulary has tokens for, from 0.98; others are bytes."""
    user_symbols: tuple[str, ...] = ()
    """Strings that are always one token of a trained vocabulary, as markers in the text."""
    byte_fallback: bool = True
    """Whether characters outside the vocabulary are spelt in bytes, so that every text survives the round trip."""
    sample_bytes: int = 100_000_000
    """Text the vocabulary is trained on, drawn over the source's files."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    steps: int = 10_000
    """Optimizer steps."""
    epochs: float = 0.0
    """Length of training in passes over the training rows, in place of steps. 0: steps."""
    batch_size: int = 64
    """Rows in one global batch, B."""
    accumulate: int = 1
    """Parts that a batch is worked through in, to save memory; the result is the same."""
    loss_chunk: int = 0
    """Tokens whose logits exist at once on a device. 0: 512 on CPU, 8192 on GPU, those of 1 GiB on TPU."""
    loss_logits: Literal["float32", "compute"] = "float32"
    """Type of the logits on their way to the loss; `compute` is model.dtype, half the traffic. Sums are float32."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser in the loss (PaLM uses 1e-4)."""
    balance_loss: float = 0.01
    """Weight of how unevenly tokens go to experts, 1 where evenly, in the loss (Switch, DeepSeek-V3: of each row)."""
    router_z_loss: float = 0.0
    """Weight of the squared log-normaliser of the experts' router in the loss (ST-MoE uses 1e-3)."""
    label_smoothing: float = 0.0
    """Probability spread evenly over the vocabulary in the targets."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which evaluation then uses; it rises as (1 + n) / (10 + n). 0: off."""
    resume_from: int = 0
    """Checkpoint to go back to, once; later ones are set aside. 0: go on from the newest."""
    init_from: str = ""
    """A run, RUN/checkpoints/N, or a Hugging Face model (directory, hf://ORG/NAME) whose weights a fresh run takes."""
    watchdog: float = 60.0
    """Seconds without a step, or a sign of life of another process, that end a run (77). 0: wait for ever."""
    reproducible: bool = False
    """Whether 1, 2, 4 or 8 devices, all on data, train to the same bits; to audit by, as it costs time and memory."""
    spike: float = 0.0
    """Standard deviations above the usual that make a loss a spike, which the run then goes round (PaLM). 0: never."""
    spike_steps: int = 10
    """Steps in a row that a spike lasts; what is usual is told by ten times as many before."""
    check_copies: int = 0
    """Steps between comparisons of devices' copies of the weights, bit by bit: damage ends the run (77). 0: never."""
    frozen: tuple[str, ...] = ()
    """Parameters that stay as they are, by pattern, as `embed,blocks.*`; ! exempts: `*,!top.*` trains heads alone."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights move."""

    name: Literal["sgd", "adam", "adamw", "adafactor", "lion", "muon"] = "adamw"
    """Optimizer, all from optax. `adam` has no weight decay; `muon` treats what is not a matrix with adamw."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "rsqrt", "wsd"] = "cosine"
    """Shape after the warm-up. `rsqrt`: reciprocal square root; `wsd`: flat, then linear over the last fifth."""
    warmup_steps: int = 100
    """Steps of linear rise from warmup_from."""
    warmup_from: float = 0.0
    """Learning rate of the first step, relative to the peak; with 0 that step changes no weight."""
    final_ratio: float = 0.1
    """Learning rate at the end, relative to the peak (linear, cosine, wsd)."""
    b1: float = 0.9
    """Decay of the first moment; the momentum of sgd and muon."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    nesterov: bool = False
    """Whether momentum looks ahead (sgd, adam, adamw, muon)."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only: no biases, norms or positions."""
    layer_decay: float = 1.0
    """Learning rate of each layer relative to that of the one above it, down to the embeddings (BEiT). 1: the same."""
    clip: float = 1.0
    """Largest global norm of the gradient. 0: no clipping."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which moments are kept; bfloat16 is rounded up or down at random, so that small changes add up."""
    offload: bool = False
    """Whether moments wait in the host's memory between steps, which leaves room on devices and costs time."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each axis has. One axis may be -1: all that are left. 0: as the preset says, or 1."""

    preset: Literal["ddp", "fsdp", "tp", "fsdp_tp", "fsdp_context", "moe"] = "ddp"
    """Sizes of the axes that are 0: all devices on data, fsdp or tensor; fsdp with tensor, context or expert=4."""
    stage: int = 0
    """Layers are split into stages of a pipeline, which pass parts of a batch on."""
    data: int = 0
    """Rows are split, weights are copied; optimizer state is split all the same."""
    fsdp: int = 0
    """Rows, weights and optimizer state are split; weights are gathered layer by layer."""
    expert: int = 0
    """Experts are split, and rows; all other weights as by fsdp."""
    context: int = 0
    """Positions of a row are split, for long ones; weights as by fsdp."""
    tensor: int = 0
    """Heads, MLP width and vocabulary are split."""
    dcn_stage: int = 1
    """Slices of TPUs, or GPU hosts, that an axis spans over the slow network between them; here stage."""
    dcn_data: int = 1
    """The same of data: its size is dcn_data * data."""
    dcn_fsdp: int = 1
    """The same of fsdp."""
    rules: tuple[str, ...] = ()
    """Changes to the table in sharding.py, logical axis=mesh axes: `mlp=tensor+context,vocab=`."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved, when, and kept how long. The last step is always saved."""

    every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """How many of the latest are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for ever. 0: none."""
    export_every: int = 0
    """Steps between Hugging Face directories, WORKDIR/exports/STEP; a multiple of every. 0: none."""
    best: str = ""
    """Evaluation metric whose best value's checkpoint is kept too, as `eval/loss` or `eval/bleu`. Empty: none."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during training, on the held-out documents."""

    every: int = 1000
    """Steps between evaluations; one is always run at the end. 0: only that one."""
    batches: int = 0
    """Batches of one evaluation. 0: the whole set, each document exactly once."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How text is continued; also the samples shown at each evaluation."""

    prompts: tuple[str, ...] = ()
    """Prompts of the samples drawn at each evaluation. Empty: no samples."""
    max_tokens: int = 128
    """Tokens to generate at most."""
    temperature: float = 1.0
    """Divides the logits. 0: always the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens. 0: all."""
    top_p: float = 1.0
    """Draw among the fewest tokens that hold this much probability."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides (or multiplies, below 0) the logits of tokens seen before."""
    lookup: int = 0
    """Tokens guessed at once from what the text says already: no text changes, but some come sooner. 0: off."""
    beams: int = 1
    """Texts kept side by side in beam search. 1: one, drawn as above."""
    length_penalty: float = 0.6
    """Beams are ranked by log-probability / ((5 + length) / 6) ** this (Wu et al. 2016); see early_stopping."""
    early_stopping: Literal["exact", "never", "heuristic", "first"] = "exact"
    """`exact`: no better text can follow. Others: as transformers (never, false, true), by length ** length_penalty."""
    renormalize: bool = True
    """Renormalizes the probabilities of beams after tokens that may not be written are left out."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text besides the vocabulary's own, as the end of a turn in a chat."""
    never_ids: tuple[int, ...] = ()
    """Tokens that are never written, as Marian's padding."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """Tokens that are not written first."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that are never written, as a JSON list of lists."""
    no_repeat_ngram_size: int = 0
    """No sequence of this many tokens stands twice in prompt and text. 0: any may."""
    min_new_tokens: int = 0
    """Tokens written before the text may end at a token that ends it."""
    eos: bool = True
    """Ends a text at the end-of-text token of the tokenizer; some pretrained models name others only."""
    forced_eos: bool = False
    """Makes the end-of-text token the last one where a text reaches max_tokens (Marian)."""
    bos: bool = True
    """Whether a decoder reads the token that begins a text before the prompt; some pretrained ones never saw one."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is recorded."""

    every: int = 10
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = True
    """Whether TensorBoard events are written too (needs tensorflow, clu). False: threads take the place of tf.data."""
    timing: bool = True
    """Whether metrics.jsonl holds wall-clock figures. False: equal runs write equal bytes."""
    profile: tuple[int, ...] = ()
    """First and last step of a profiler trace, written to WORKDIR/profile."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    seed: int = 0
    """Seed of initial weights, data order, dropout and sampling."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    clean: CleanConfig = field(default_factory=CleanConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    log: LogConfig = field(default_factory=LogConfig)
