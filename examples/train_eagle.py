"""Train an EAGLE-3 head for Pico in the published layout, and count what it drafts right.

    python examples/train_eagle.py --out eagle
    python examples/train_eagle.py --out eagle --steps 300 --batch 2048    # a few minutes on a CPU

The head learns to say what Pico says (Li et al. 2025, arXiv:2503.01840): by the cross entropy with
its distribution over the most frequent tokens, on the text that Pico was trained on, and in each
step for several tokens in a row, each over the head's own states for the ones before (training-time
test). What it drafts on held-out files is verified by Ingot, greedily and all of it, beside the
drafts of Pico's own layer of multi-token prediction. The directory `--out` becomes the head, with
`acceptance.json` in it. It takes minutes on one H200.
"""

import argparse
import json
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ingot
import torch
import torch.nn.functional as F
from ingot.frontends.drivers import driver_here
from ingot.frontends.text.model_tokenizer import open_tokenizer
from ingot.runtime.serving.session import Session
from quality import windows
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from train_pico import encode, read_corpus, wide_experts
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

# What layers 1, 3 and 4 take: the paper's layers are one and the same of Pico's five.
FEATURES = (1, 3, 4)
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
# How many tokens in a row are learned, each of which counts for less than the one before.
UNROLLED, DECAY = 4, 0.8
MOST = 4


def head_config(pico: PreTrainedModel, draft_vocab: int) -> LlamaConfig:
    """The shape of the head: one layer of llama's, as wide as Pico."""
    own = pico.config
    return LlamaConfig(
        architectures=["LlamaForCausalLMEagle3"],
        vocab_size=own.vocab_size,
        hidden_size=own.hidden_size,
        intermediate_size=own.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=own.max_position_embeddings,
        rms_norm_eps=own.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        draft_vocab_size=draft_vocab,
        **{LAYER_IDS: list(FEATURES)},
    )


def later(x: Tensor, by: int) -> Tensor:
    """x [..., T, D] `by` positions later; zeros come first."""
    return F.pad(x, (0, 0, by, 0))[..., : x.shape[-2], :] if by else x


class Layer(nn.Module):
    """The decoder layer, which attends over pairs of an embedding and a hidden state."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, 0)
        for name in ("q_proj", "k_proj", "v_proj"):
            wide = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
            setattr(self.self_attn, name, wide)
        self.mlp = LlamaMLP(config)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        embedded: Tensor,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        past: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """States [B, T, H]; `past` are the keys and values of the steps before, to which its own
        are added.

        When token t is drafted in step j, what steps 1 to j made lies at the last j positions of
        the cache, one of each, and what step 0 made before them.
        """
        attention = self.self_attn
        heads = (*hidden.shape[:-1], -1, attention.head_dim)
        pairs = torch.cat([self.input_layernorm(embedded), self.hidden_norm(hidden)], -1)
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        q, k, v = (project(pairs).view(heads).transpose(1, 2) for project in projections)
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        past.append((k, v))
        (keys, values), *later_made = past
        step, length = len(later_made), q.shape[-2]
        seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril(-step)
        scores = [(q @ keys.mT).masked_fill(~seen, -torch.inf)]
        own = [tuple(later(x, step - i) for x in made) for i, made in enumerate(later_made, 1)]
        scores += [(q * key).sum(-1, keepdim=True) for key, _ in own]
        weights = (torch.cat(scores, -1) * attention.scaling).softmax(-1)
        weights, *others = weights.split([length] + [1] * step, -1)
        attended = weights @ values + sum(
            w * value for w, (_, value) in zip(others, own, strict=True)
        )
        hidden = hidden + attention.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Head(nn.Module):
    """An EAGLE-3 head, its tensors under the published names."""

    def __init__(self, config: LlamaConfig, ids: Tensor, pico: PreTrainedModel) -> None:
        super().__init__()
        width = config.hidden_size
        self.fc = nn.Linear(len(FEATURES) * width, width, bias=False)
        self.midlayer = Layer(config)
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.lm_head = nn.Linear(width, len(ids), bias=False)
        self.lm_head.weight.data.copy_(pico.get_output_embeddings().weight[ids])
        self.rotary = LlamaRotaryEmbedding(config)
        self.ids = ids

    def forward(self, features: Tensor, embedded: Tensor) -> list[Tensor]:
        """Logits [B, T, draft_vocab] of each unrolled step, of which j has none before row j.

        Row t drafts behind the token `embedded` there, which follows the t-th; features [B, T, 3H].
        """
        hidden = self.fc(features)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotary = self.rotary(hidden, positions)
        past: list[tuple[Tensor, Tensor]] = []
        logits = []
        for _ in range(UNROLLED):
            state = self.midlayer(embedded, hidden, rotary, past)
            logits.append(self.lm_head(self.norm(state)))
            hidden = later(state, 1)
        return logits

    def published(self) -> dict[str, Tensor]:
        """Its state dict as it is stored, in bf16, with the map between the vocabularies."""
        vocab = self.rotary.config.vocab_size
        return {
            **{name: weight.bfloat16() for name, weight in self.state_dict().items()},
            "d2t": self.ids - torch.arange(len(self.ids), device=self.ids.device),
            "t2d": torch.isin(torch.arange(vocab, device=self.ids.device), self.ids),
        }


def losses(head: Head, pico: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The loss over windows ids [B, T + 1], in nats a token, and the share of each step's drafts
    that are what Pico says."""
    with torch.no_grad():
        said = pico(ids[:, :-1], output_hidden_states=True, use_cache=False)
        features = torch.cat([said.hidden_states[i] for i in FEATURES], -1)
        embedded = pico.get_input_embeddings()(ids[:, 1:])
        # Row t drafts what Pico says at the next row.
        logits = said.logits[:, 1:].float()
        wanted = logits[..., head.ids].softmax(-1)
        likeliest = logits.argmax(-1)
        known = torch.isin(likeliest, head.ids)
    loss, right = torch.zeros((), device=ids.device), []
    for step, predicted in enumerate(head(features, embedded)):
        rows = slice(step, None)
        drafted = predicted[:, :-1].float()[:, rows]
        nats = -(wanted[:, rows] * drafted.log_softmax(-1)).sum(-1)
        loss = loss + DECAY**step * (nats * known[:, rows]).mean()
        right.append((head.ids[drafted.argmax(-1)] == likeliest[:, rows]).float().mean())
    return loss, torch.stack(right).detach()


def train(
    head: Head,
    pico: PreTrainedModel,
    stream: Tensor,
    steps: int,
    batch: int,
    window: int,
    lr: float,
) -> None:
    """In place, on `stream` i32[N]; `batch` and `window` are in tokens."""
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    offsets = torch.arange(window + 1)
    device = head.ids.device
    for step in track(range(steps), "training"):
        random = torch.Generator().manual_seed(step)
        rows = (max(batch // window, 1), 1)
        starts = torch.randint(len(stream) - len(offsets), rows, generator=random)
        ids = stream[starts + offsets].long().to(device)
        ids[:, 0] = pico.config.bos_token_id
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, right = losses(head, pico, ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        if step % max(steps // 10, 1) == 0 or step == steps - 1:
            shares = " ".join(f"{share:.0%}" for share in right.tolist())
            print(f"step {step}: loss {loss.item():.3f}, right by place {shares}")


@dataclass(frozen=True)
class Accepted:
    """What came of drafts of up to `k` tokens where all are verified: the mean of the tokens of a
    step, and for each place of a draft which share of the tokens drafted there was accepted."""

    drafter: str
    k: int
    length: float
    rates: tuple[float, ...]


def accepted(
    model: Path,
    drafting: ingot.Eagle3 | ingot.MTP,
    prompts: Sequence[Sequence[int]],
    tokens: int,
) -> list[Accepted]:
    """By Ingot, of greedy continuations of `prompts` by so many tokens, for every k."""
    found = []
    with ingot.compile(
        model,
        speculate=drafting,
        max_sequences=1,
        max_tokens_per_sequence=max(map(len, prompts)) + tokens,
        progress=False,
    ) as compiled:
        lowered = compiled.exportable.lowered
        driver = driver_here(lowered.program.target)
        for k in range(1, drafting.k + 1):
            executable = driver.load(lowered.program, lowered.load_weight)
            drafter = replace(drafting, k=k).drafter()
            with Session(lowered.program, executable, drafter=drafter) as session:
                session.generate(prompts, max_new_tokens=tokens)
                stats = session.stats
            kind = type(drafting).__name__
            found.append(Accepted(kind, k, stats.acceptance_length, stats.acceptance_rates))
    return found


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Train an EAGLE-3 head for Pico.")
    parser.add_argument("--model", type=Path, default=here / "pico")
    parser.add_argument("--out", type=Path, default=Path("eagle"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32768, help="tokens of a step")
    parser.add_argument("--window", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--draft-vocab", type=int, default=1024, help="most frequent tokens")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64, help="tokens behind each prompt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    args = parser.parse_args()

    documents = read_corpus(args.stdlib)
    texts = [d.text for d in documents if not d.held_out]
    backend = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    stream = torch.from_numpy(encode(backend, texts, None, 0))
    torch.manual_seed(0)
    ALL_EXPERTS_FUNCTIONS.register("wide", wide_experts)
    pico = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, experts_implementation="wide"
    )
    pico = pico.to(args.device).eval().requires_grad_(False)
    counts = torch.bincount(stream, minlength=pico.config.vocab_size)
    ids = counts.topk(args.draft_vocab).indices.sort().values
    covered = counts[ids].sum() / counts.sum()
    print(f"{len(stream):,} tokens, of which the draft vocabulary is {covered:.1%}")

    config = head_config(pico, args.draft_vocab)
    head = Head(config, ids.to(args.device), pico).to(args.device)
    started = time.monotonic()
    train(head, pico, stream, args.steps, args.batch, args.window, args.lr)
    seconds = time.monotonic() - started
    config.save_pretrained(args.out)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in head.published().items()}
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})

    tokenizer = open_tokenizer(args.model)
    held_out = (d.text for d in documents if d.held_out)
    prompts = windows(tokenizer, held_out, args.prompts * args.window, args.window)
    results = accepted(args.model, ingot.Eagle3(args.out, MOST), prompts, args.tokens)
    results += accepted(args.model, ingot.MTP(MOST), prompts, args.tokens)
    for r in results:
        rates = "  ".join(f"{rate:.0%}" for rate in r.rates)
        print(f"{r.drafter}, k = {r.k}: {r.length:.2f} tokens a step; accepted by place: {rates}")
    data = {
        "steps": args.steps,
        "batch": args.batch,
        "window": args.window,
        "draft_vocab": args.draft_vocab,
        "covered": covered.item(),
        "seconds": seconds,
        "parameters": sum(p.numel() for p in head.parameters()),
        "prompts": len(prompts),
        "tokens": args.tokens,
        "accepted": [asdict(r) for r in results],
    }
    (args.out / "acceptance.json").write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
