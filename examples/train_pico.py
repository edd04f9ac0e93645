"""Train Pico: DeepSeek-V3's architecture, small enough to keep in a repository.

    python examples/train_pico.py --out examples/pico

The corpus is the Python standard library of the running interpreter (or of `--stdlib`), so nothing
is downloaded. The result is a Hugging Face directory under DeepSeek's tensor names: multi-head
latent attention, a dense layer, then mixtures of experts behind a sigmoid, group-limited router,
and one multi-token-prediction (MTP) layer. It takes minutes on one H200, and a run that was cut
off goes on from `--checkpoint`.

Source: DeepSeek-V3 Technical Report, arXiv:2412.19437, section 2.
"""

import argparse
import json
import math
import re
import runpy
import sysconfig
import time
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_layers import MtpModel

BEGIN, END = "<|begin|>", "<|endoftext|>"
PROMPTS = ["import os\n", "def __init__(self, ", "for i in range("]
PROMPTS += ["with open(filename, 'rb') as f:\n", "class Stack:\n    def __init__(self):\n"]


@dataclass(frozen=True)
class Recipe:
    """How Pico is trained. `windows` and `batch` are in tokens, `chop` is in characters.

    Steps take the windows in turn: the short ones show the model many beginnings of a context.
    """

    steps: int = 4500
    batch: int = 65536
    windows: tuple[int, ...] = (256, 2048)
    peak_lr: float = 4e-3
    warmup: int = 300
    weight_decay: float = 0.15
    dropout: float = 0.15
    mtp_weight: float = 0.3
    bias_rate: float = 1e-3
    passes: int = 4
    chop: int = 64
    report_every: int = 250


def pico_config() -> DeepseekV3Config:
    """The shape of the model: every linear reads a multiple of 32, so that all can be MXFP4."""
    width = dict(vocab_size=4096, hidden_size=192, intermediate_size=640, moe_intermediate_size=64)
    depth = dict(num_hidden_layers=5, first_k_dense_replace=1, num_nextn_predict_layers=1)
    heads = dict(num_attention_heads=8, num_key_value_heads=8)
    ranks = dict(q_lora_rank=128, kv_lora_rank=64)
    head_dims = dict(qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
    experts = dict(n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4)
    router = dict(n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5)
    router |= dict(scoring_func="sigmoid", topk_method="noaux_tc")
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    positions = dict(max_position_embeddings=2048, rope_parameters=rope)
    tokens = dict(bos_token_id=0, eos_token_id=1)
    shape = width | depth | heads | ranks | head_dims | experts | router | positions | tokens
    return DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], dtype="bfloat16", **shape)


@dataclass(frozen=True)
class Document:
    """One file of the corpus."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        """One file in 25 is for validation, by a hash of its path."""
        return zlib.crc32(self.path.encode()) % 25 == 0

    @property
    def is_test(self) -> bool:
        return re.search(r"(^|/)(tests?|idle_test)/", self.path) is not None


def read_corpus(stdlib: Path) -> list[Document]:
    """Sources and prose under `stdlib`: no installed packages, duplicates or tables of numbers."""
    found: dict[str, Document] = {}
    for file in sorted(stdlib.rglob("*")):
        path = file.relative_to(stdlib).as_posix()
        if file.suffix not in {".py", ".rst", ".txt", ".md"} or "-packages/" in path:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the library tests its codecs with such files
        if path == "pydoc_data/topics.py":  # the language reference, as a dict of strings
            text = "\n".join(runpy.run_path(str(file))["topics"].values())
        digits = sum(map(str.isdigit, text))
        if digits < 0.1 * len(text) and text.count("0x") < len(text) / 200:
            found.setdefault(text, Document(path, text))
    return list(found.values())


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: a word takes the blank before it, and indentation is one token."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*\n|\s+(?!\S)|\s+")
    split = pre_tokenizers.Split(words, "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Iterable[str], chop: int | None, seed: int) -> np.ndarray:
    """One stream of token ids, an end-of-text token before each text.

    With `chop`, texts are cut between words, at random, before they are encoded. A prompt may end
    where running text would have put the next character into the same token (`self, `): the cuts
    show the model such ends, and vary the tokens of each pass over the corpus.
    """
    random = np.random.default_rng(seed)
    pieces: list[str] = []
    for text in texts:
        cuts = np.sort(random.integers(0, len(text), len(text) // chop)) if chop else []
        cuts = [cut for cut in cuts if re.match(r"\W", text[cut - 1])]
        pieces += [END, *(text[a:b] for a, b in pairwise([0, *cuts, len(text)]))]
    encodings = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
    return np.concatenate([np.array(e.ids, dtype=np.int32) for e in encodings])


def causal_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Causal attention; values are padded to the width of keys, as flash kernels want it."""
    width = v.shape[-1]
    v = F.pad(v, (0, k.shape[-1] - width))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    return out[..., :width].transpose(1, 2), None


def wide_experts(experts: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """All routed experts as one wide SwiGLU, weighted by 0 where a token does not go.

    At this size that beats gathering the tokens of each expert. x [T, H], chosen, weights [T, k].
    """
    spread = torch.zeros_like(x[:, : experts.num_experts])
    spread = spread.scatter(1, chosen, weights.to(x.dtype))
    gate_up = F.linear(x, experts.gate_up_proj.flatten(0, 1))
    gate, up = gate_up.unflatten(-1, (experts.num_experts, 2, -1)).unbind(-2)
    act = F.silu(gate) * up * spread[..., None]
    return F.linear(act.flatten(-2), experts.down_proj.transpose(0, 1).flatten(1))


class Pico(nn.Module):
    """Transformers' DeepSeek-V3 and its MTP layer, which share the embedding and the head."""

    def __init__(self, main: PreTrainedModel, mtp: MtpModel) -> None:
        super().__init__()
        self.main = main
        self.mtp = mtp

    @classmethod
    def fresh(cls, config: DeepseekV3Config, dropout: float) -> "Pico":
        """Untrained, and fitted with what training needs: dropout, and counts of expert loads."""
        AttentionInterface.register("causal", causal_attention)
        ALL_EXPERTS_FUNCTIONS.register("wide", wide_experts)
        main = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="causal", experts_implementation="wide"
        )
        pico = cls(main, MtpModel(main, config.num_nextn_predict_layers))
        for name, weight in pico.named_parameters():
            if weight.dim() > 1:
                onto_residual = "o_proj" in name or "down_proj" in name
                branches = 2 * config.num_hidden_layers if onto_residual else 1
                nn.init.normal_(weight, std=config.initializer_range / branches**0.5)

        def drop(module: nn.Module, _: tuple, output: Tensor) -> Tensor:
            return F.dropout(output, dropout, module.training)

        def count(gate: nn.Module, _: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if gate.training:
                gate.load += F.one_hot(output[2], config.n_routed_experts).sum((0, 1))

        for name, module in pico.named_modules():
            if name.endswith(("o_proj", "mlp")):
                module.register_forward_hook(drop)
            if name.endswith("mlp.gate"):
                load = torch.zeros(config.n_routed_experts)
                module.register_buffer("load", load, persistent=False)
                module.register_forward_hook(count)
        return pico

    @classmethod
    def load(cls, directory: Path) -> "Pico":
        """What transformers makes of a saved directory."""
        main = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        # MtpModel takes the layers that plain loading ignores: transformers knows the 61st only.
        layer = main.config.num_hidden_layers
        main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layer}\."]
        return cls(main, MtpModel.from_pretrained(main)).eval()

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the main model for ids[:, 1:-1] and of MTP for ids[:, 2:]; ids [B, S + 2].

        The MTP layer reads the main model's normalised hidden state of a token, and the next token.
        """
        hidden = self.main.model(ids[:, :-2], use_cache=False).last_hidden_state
        following = self.main.model.embed_tokens(ids[:, 1:-1])
        positions = torch.arange(1, ids.shape[1] - 1, device=ids.device)[None]
        rotary = self.main.model.rotary_emb(following, positions)
        drafted = self.mtp.layers[0](following, hidden, rotary, None, positions, None)
        return self.main.lm_head(hidden), self.main.lm_head(drafted)


@torch.no_grad()
def rebalance(gate: nn.Module, rate: float) -> Tensor:
    """Raise the bias of experts below the mean load, lower it above; returns max / mean load.

    Balance without an auxiliary loss: the bias steers the choice of experts, never their weights.
    """
    mean = gate.load.mean()
    imbalance = gate.load.max() / mean
    gate.e_score_correction_bias += rate * (mean - gate.load).sign()
    gate.load.zero_()
    return imbalance


def losses(pico: Pico, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropies of the main model and of the MTP layer, in nats per token."""
    main, mtp = pico(ids)
    return (
        F.cross_entropy(main.flatten(0, 1).float(), ids[:, 1:-1].flatten()),
        F.cross_entropy(mtp.flatten(0, 1).float(), ids[:, 2:].flatten()),
    )


@torch.no_grad()
def validate(pico: Pico, windows: Tensor) -> tuple[float, float]:
    """Mean loss of the main model, and MTP acceptance, over windows [N, S + 2].

    Acceptance: the MTP layer reads the true next token and drafts the one after. How often is that
    what the main model itself says, greedily, once it has read that token?
    """
    loss, accepted = [], []
    for ids in windows.split(8):
        main, mtp = pico(ids)
        nats = F.cross_entropy(main.mT.float(), ids[:, 1:-1], reduction="none")
        loss.append(nats.flatten())
        accepted.append((mtp[:, :-1].argmax(-1) == main[:, 1:].argmax(-1)).flatten())
    return torch.cat(loss).mean().item(), torch.cat(accepted).float().mean().item()


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < recipe.warmup:
        return recipe.peak_lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
    return recipe.peak_lr * (1 + math.cos(math.pi * done)) / 2


def train(
    pico: Pico, recipe: Recipe, stream: Tensor, held_out: Tensor, checkpoint: Path
) -> list[dict[str, float]]:
    """Train in place, on from `checkpoint` if it exists; returns one entry per report.

    `stream` is token ids [N], `held_out` windows [M, S + 2], both on the device of the model.
    """
    device = stream.device.type
    matrices = [p for p in pico.parameters() if p.dim() > 1]
    norms = {"params": [p for p in pico.parameters() if p.dim() == 1], "weight_decay": 0.0}
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, norms]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    history: list[dict[str, float]] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        pico.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
    first, seconds = (history[-1]["step"], history[-1]["seconds"]) if history else (0, 0.0)
    started = time.monotonic()
    compiled = torch.compile(losses, dynamic=False)
    gates = [module for module in pico.modules() if hasattr(module, "e_score_correction_bias")]

    for step in track(range(first, recipe.steps), "training"):
        pico.train()
        random = torch.Generator().manual_seed(step)  # a resumed run draws the same windows
        window = recipe.windows[step % len(recipe.windows)]
        offsets = torch.arange(window + 2)
        rows = (recipe.batch // window, 1)
        starts = torch.randint(len(stream) - len(offsets), rows, generator=random)
        ids = stream[(starts + offsets).to(device)].long()
        ids[:, 0] = pico.main.config.bos_token_id
        with torch.autocast(device, dtype=torch.bfloat16):
            main, mtp = compiled(pico, ids)
        (main + recipe.mtp_weight * mtp).backward()
        nn.utils.clip_grad_norm_(pico.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        optimizer.step()
        optimizer.zero_grad()
        imbalance = [rebalance(gate, recipe.bias_rate) for gate in gates]
        if (step + 1) % recipe.report_every and step + 1 != recipe.steps:
            continue

        pico.eval()
        with torch.autocast(device, dtype=torch.bfloat16):
            val_loss, acceptance = validate(pico, held_out)
        entry = {
            "step": step + 1,
            "seconds": seconds + time.monotonic() - started,
            "loss": main.item(),
            "mtp_loss": mtp.item(),
            "val_loss": val_loss,
            "mtp_acceptance": acceptance,
            "max_over_mean_load": max(imbalance).item(),
        }
        history.append(entry)
        print("  ".join(f"{k} {v:.5g}" for k, v in entry.items()))
        weights = {"model": pico.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**weights, "history": history}, checkpoint)
    return history


def to_deepseek(pico: Pico) -> dict[str, Tensor]:
    """DeepSeek's state dict: bf16, a tensor per expert, the MTP layer after the last layer."""
    state = pico.main.state_dict()
    mtp = f"model.layers.{pico.main.config.num_hidden_layers}"
    for name, weight in pico.mtp.layers[0].state_dict().items():
        theirs = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        state[f"{mtp}.{theirs}"] = weight
    state[f"{mtp}.embed_tokens.weight"] = state["model.embed_tokens.weight"]
    state[f"{mtp}.shared_head.head.weight"] = state["lm_head.weight"]

    tensors: dict[str, Tensor] = {}
    for name, weight in state.items():
        experts, _, projection = name.rpartition(".")
        if projection == "gate_up_proj":
            for i, (gate, up) in enumerate(weight.unflatten(1, (2, -1))):
                tensors[f"{experts}.{i}.gate_proj.weight"] = gate
                tensors[f"{experts}.{i}.up_proj.weight"] = up
        elif projection == "down_proj":
            tensors |= {f"{experts}.{i}.down_proj.weight": down for i, down in enumerate(weight)}
        else:
            tensors[name] = weight
    keep = "e_score_correction_bias"  # transformers, too, holds it in float32
    return {
        name: weight.to(torch.float32 if name.endswith(keep) else torch.bfloat16, copy=True)
        for name, weight in tensors.items()
    }


def save(pico: Pico, tokenizer: Tokenizer, out: Path) -> None:
    """Write a directory that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(to_deepseek(pico), out / "model.safetensors", metadata={"format": "pt"})
    config = pico_config()
    config.save_pretrained(out)
    GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1).save_pretrained(out)
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": END}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=config.max_position_embeddings, **special
    ).save_pretrained(out)


def plot(history: list[dict[str, float]], file: Path) -> None:
    """The loss curve."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    steps = [entry["step"] for entry in history]
    labels = {"loss": "training", "val_loss": "held-out files", "mtp_loss": "MTP, training"}
    for key, label in labels.items():
        axes.plot(steps, [entry[key] for entry in history], label=label)
    axes.set(xlabel="step", ylabel="nats per token", ylim=(0.8, 3.5))
    axes.legend(frameon=False)
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train Pico on Python's standard library.")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pico")
    parser.add_argument("--checkpoint", type=Path, default=Path("pico.ckpt"))
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    args = parser.parse_args()
    recipe, config = Recipe(steps=args.steps), pico_config()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    documents = read_corpus(args.stdlib)
    kept = [d for d in documents if not d.held_out]
    tokenizer = train_tokenizer((d.text for d in kept), config.vocab_size)
    # Every pass reads the library; each test file comes in one pass only.
    passes = [
        [d.text for d in kept if not d.is_test or zlib.crc32(d.path.encode()) % recipe.passes == i]
        for i in range(recipe.passes)
    ]
    stream = np.concatenate([encode(tokenizer, p, recipe.chop, i) for i, p in enumerate(passes)])
    validation = encode(tokenizer, [d.text for d in documents if d.held_out], None, 0)
    length = max(recipe.windows) + 2
    whole = validation[: len(validation) // length * length]
    held_out = torch.tensor(whole, device=device).long().view(-1, length)
    held_out[:, 0] = config.bos_token_id

    pico = Pico.fresh(config, recipe.dropout).to(device)
    history = train(pico, recipe, torch.tensor(stream, device=device), held_out, args.checkpoint)
    save(pico, tokenizer, args.out)
    plot(history, args.out / "loss.png")

    loaded = Pico.load(args.out).to(device)
    loss, acceptance = validate(loaded, held_out)
    completions = []
    reader = AutoTokenizer.from_pretrained(args.out)
    for prompt in PROMPTS:
        inputs = reader(prompt, return_tensors="pt").to(device)
        generated = loaded.main.generate(**inputs, max_new_tokens=48)[0]
        completions.append(reader.decode(generated, skip_special_tokens=True))
    held_out_bytes = sum(len(d.text.encode()) for d in documents if d.held_out)
    metrics = {
        "corpus_files": len(documents),
        "corpus_bytes": sum(len(d.text.encode()) for d in documents),
        "stream_tokens": len(stream),
        "held_out_bytes": held_out_bytes,
        "held_out_tokens": len(validation),
        "parameters": sum(p.numel() for p in pico.parameters()),
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) * len(validation) / held_out_bytes,
        "mtp_acceptance": acceptance,
        "completions": completions,
        "recipe": asdict(recipe),
        "history": history,
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"{args.out}: perplexity {math.exp(loss):.3f}, MTP acceptance {acceptance:.1%}")


if __name__ == "__main__":
    main()
