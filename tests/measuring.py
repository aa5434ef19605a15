"""What a hooked model keeps of Hugging Face's, measured: numbers, hooks, edits, sums, processing.

`measured` fills a `Finding` for one configuration. Nothing here stops at the first fault: each
check either adds to the finding or says in `faults` what failed, so that a survey over every type
can go on. Hugging Face's own module is the truth for numbers and generation.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hf_truth import forget_rope
from torch import Tensor, nn
from transformers import PreTrainedModel

import hookedlm
from hookedlm import HookedTransformer
from hookedlm.convert.hf import first_position
from hookedlm.errors import HookedLMError
from hookedlm.layers.attention import Attention
from hookedlm.layers.mlp import MLP, GatedMLP
from hookedlm.layers.norm import Norm
from hookedlm.layers.opaque import OpaqueBlock
from hookedlm.spec import OpaqueSpec

LENGTH = 9
PADDING = 4
NEW_TOKENS = 4
ROUNDING = 1e-5
"""What two orders of the same float32 additions may differ by, relative to the largest value."""
LOG_PROBS = 1e-4
"""What processing may change a log-probability by."""
HALF = 5e-2
"""What the median logit may be off by in bfloat16, relative to the largest."""
EFFECT = 1e-5
"""What an edit must change a logit by, relative to the largest."""

Build = Callable[[torch.dtype], PreTrainedModel]


@dataclass
class Finding:
    """What one configuration came to; plain values, so that it can be written as JSON."""

    forms: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    generation: dict[str, str] = field(default_factory=dict)
    hooks: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)

    @property
    def uniform(self) -> bool:
        """Whether no part runs as Hugging Face wrote it."""
        return bool(self.forms) and not any(form.startswith("opaque") for form in self.forms)


def measured(build: Build) -> Finding:
    """Everything below, for one configuration."""
    found = Finding()
    theirs = build(torch.float32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        with told(found, "load"):
            ours = hookedlm.load(theirs)
            forms_of(ours, found)
            for check in (numbers, generation, hooks, edits, sums, logits_by_part):
                with told(found, check.__name__):
                    check(theirs, ours, found)
            for check in (processing, half_precision):
                with told(found, check.__name__):
                    check(build, found)
    return found


class told:
    """A context in which an exception becomes a fault."""

    def __init__(self, found: Finding, what: str):
        self.found, self.what = found, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        self.found.faults.append(f"{self.what}: {type(error).__name__}: {short(str(error))}")
        return True


def short(text: str, length: int = 160) -> str:
    """The beginning of a message, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length] + " ..."


def forms_of(ours: HookedTransformer, found: Finding) -> None:
    """How many parts have which form, and why parts are opaque."""
    for part in ours.fidelity().parts:
        found.forms[part.form] = found.forms.get(part.form, 0) + 1
        if part.opaque:
            found.reasons.setdefault(part.form.removeprefix("opaque "), part.reason)


# Numbers ------------------------------------------------------------------------------------------


def prompts(theirs: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the same padded on the left, and the mask of those."""
    n = theirs.get_input_embeddings().weight.shape[0] - 1
    tokens = torch.randint(3, min(n, 90), (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :PADDING] = 0
    return tokens, tokens * mask, mask


def inputs_of(theirs: PreTrainedModel, tokens: Tensor, mask: Tensor | None) -> dict:
    """Keyword arguments of a forward pass, with the positions that generation would give."""
    inputs: dict = {"input_ids": tokens}
    accepted = inspect.signature(theirs.forward).parameters
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if mask is not None and "attention_mask" in accepted:
        inputs["attention_mask"] = mask
        if "position_ids" in accepted:
            inputs["position_ids"] = positions(theirs, mask)
    return inputs


def positions(theirs: PreTrainedModel, mask: Tensor) -> Tensor:
    """A count of the real tokens, from where the table of positions begins."""
    tables = [m for n, m in theirs.named_modules() if re.search(r"position_embeddings?$", n)]
    first = first_position(tables[0]) if tables else 0
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0) + first


def truth_of(theirs: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Hugging Face's logits."""
    forget_rope(theirs)
    return theirs(**inputs_of(theirs, tokens, mask)).logits


def off(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value; infinite where one is not finite."""
    if got.shape != expected.shape:
        raise ValueError(f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if not got.isfinite().all():
        return float("inf")
    difference = (got.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp(min=1e-6))


def numbers(theirs: PreTrainedModel, ours: HookedTransformer, found: Finding) -> None:
    """Logits: plain, with everything listened to, and padded on the left."""
    tokens, padded, mask = prompts(theirs)
    expected, real = truth_of(theirs, tokens), mask.bool()
    found.errors["float32"] = off(ours(tokens), expected)
    listening, _ = ours.run_with_cache(tokens, names_filter=list(ours.hook_dict))
    found.errors["listening"] = off(listening, expected)
    if "attention_mask" in inspect.signature(theirs.forward).parameters:
        expected = truth_of(theirs, padded, mask)[real]
        found.errors["padded"] = off(ours(padded, attention_mask=mask)[real], expected)
    for kind, error in found.errors.items():
        if error > ROUNDING:
            found.faults.append(f"numbers: {kind} logits {error:.1e} away")


def half_precision(build: Build, found: Finding) -> None:
    """Logits in bfloat16, padded; whether rounding made a part opaque."""
    theirs = build(torch.bfloat16)
    ours = hookedlm.load(theirs)
    tokens, _, _ = prompts(theirs)
    got, expected = ours(tokens).float(), truth_of(theirs, tokens).float()
    found.errors["bfloat16"] = off(got, expected)
    median = float((got - expected).abs().median() / expected.abs().max())
    if not median <= HALF:
        found.faults.append(f"half_precision: the median logit is {median:.1e} away")
    now = {part.form for part in ours.fidelity().parts if part.opaque} - set(found.forms)
    if now:
        found.faults.append(f"half_precision: {', '.join(sorted(now))} only in bfloat16")


# Generation ---------------------------------------------------------------------------------------


def generation(theirs: PreTrainedModel, ours: HookedTransformer, found: Finding) -> None:
    """Greedy tokens with a key-value cache, plain and padded, and without one."""
    tokens, padded, mask = prompts(theirs)
    for kind, prompt, real in (("plain", tokens, torch.ones_like(mask)), ("padded", padded, mask)):
        if kind == "padded" and "padded" not in found.errors:
            continue
        expected, how = greedy(theirs, prompt, real)
        for cached in (True, False):
            got = ours.generate(
                prompt,
                attention_mask=real,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                stop_at_eos=False,
                use_past_kv_cache=cached,
                verbose=False,
            )[:, LENGTH:]
            name = kind + (" cached" if cached else " whole")
            same = torch.equal(got, expected)
            found.generation[name] = ("equal" if same else "differs") + how
            if not same:
                found.faults.append(f"generation: {name} differs{how}: {got.tolist()} for {expected.tolist()}")


def greedy(theirs: PreTrainedModel, prompt: Tensor, real: Tensor) -> tuple[Tensor, str]:
    """The tokens Hugging Face appends, and how, if not by its own ``generate`` with a cache."""
    forget_rope(theirs)
    settings = dict(eos_token_id=None, forced_eos_token_id=None, pad_token_id=0, do_sample=False)
    settings |= dict(suppress_tokens=None, begin_suppress_tokens=None, forced_bos_token_id=None)
    inputs = inputs_of(theirs, prompt, real)
    given = {"position_ids": inputs["position_ids"]} if first_of(inputs) else {}
    for key in ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        setattr(theirs.generation_config, key, None)
    try:
        out = theirs.generate(
            prompt, attention_mask=real, max_new_tokens=NEW_TOKENS, use_cache=True, **settings, **given
        )
        return out[:, prompt.shape[1] :], ""
    except Exception as error:  # its own generation can't run this model: token by token
        why = type(error).__name__
    for _ in range(NEW_TOKENS):
        picked = truth_of(theirs, prompt, real)[:, -1].argmax(-1, keepdim=True)
        prompt, real = torch.cat([prompt, picked], 1), torch.cat([real, torch.ones_like(picked)], 1)
    return prompt[:, -NEW_TOKENS:], f" (Hugging Face's generate fails: {why}; whole passes)"


def first_of(inputs: dict) -> bool:
    """Whether positions begin elsewhere than at 0, which ``generate`` does not know by itself."""
    return "position_ids" in inputs and int(inputs["position_ids"].min()) > 0


# Hooks --------------------------------------------------------------------------------------------

BLOCK = re.compile(r"^blocks\.\d+\.")
ATTENTION = ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result")
FULL = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_resid_post",
    "hook_attn_in",
    "hook_q_input",
    "hook_k_input",
    "hook_v_input",
    "hook_mlp_in",
    *(f"ln{i}.hook_{x}" for i in (1, 2) for x in ("scale", "normalized")),
    *(f"attn.hook_{x}" for x in ATTENTION),
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
)
"""What a block can have, apart from what only some families have (post-norms, routers, ...)."""
MIXTURE = ("router_logits", "expert_weights", "expert_out")
OUTSIDE = ("hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized", "hook_logits")


def kind_of(name: str) -> str:
    """A hook's name without its layer."""
    return BLOCK.sub("blocks.L.", name)


def expected_of(block: nn.Module) -> set[str]:
    """The hooks that this block's architecture has a place for."""
    spec = block.spec
    full = set(FULL)
    if isinstance(spec, OpaqueSpec):
        return full
    if spec.layout == "parallel":
        full -= {"hook_resid_mid"}
    if spec.ln1 is None:
        full -= {"ln1.hook_scale", "ln1.hook_normalized"}
    if spec.ln2 is None:
        full -= {"ln2.hook_scale", "ln2.hook_normalized"}
    attn = block._modules.get("attn")
    if isinstance(attn, Attention):
        full -= set() if attn.spec.rotary else {"attn.hook_rot_q", "attn.hook_rot_k"}
        full -= {"hook_attn_in"} if attn.spec.n_heads != attn.spec.n_kv_heads else set()
        if attn.spec.reuses_keys is not None:
            full -= {"attn.hook_k", "attn.hook_v", "hook_k_input", "hook_v_input", "attn.hook_rot_k"}
    mlp = block._modules.get("mlp")
    if isinstance(mlp, MLP):
        full -= {"mlp.hook_pre_linear"}
    elif mlp is not None and "hook_router_logits" in mlp._modules:
        full |= {f"mlp.hook_{x}" for x in MIXTURE}
    return full


def hooks(theirs: PreTrainedModel, ours: HookedTransformer, found: Finding) -> None:
    """Which hooks there are, which are missing and why, whether each fires in its declared shape."""
    found.hooks = sorted({kind_of(name) for name in ours.hook_dict})
    wanted = [name for name in OUTSIDE]
    for i, block in enumerate(ours.blocks):
        wanted += [f"blocks.{i}.{name}" for name in sorted(expected_of(block))]
    for name in wanted:
        if name not in ours.hook_dict:
            found.missing.setdefault(kind_of(name), short(ours.why_missing(name)) or "no reason")
    tokens, _, _ = prompts(theirs)
    _, cache = ours.run_with_cache(tokens, names_filter=list(ours.hook_dict))
    silent = sorted({kind_of(name) for name in set(ours.hook_dict) - set(cache)})
    if silent:
        found.faults.append(f"hooks: never fire: {', '.join(silent)}")
    for name, why in misshapen(ours, cache).items():
        found.faults.append(f"hooks: {name}: {why}")


def misshapen(ours: HookedTransformer, cache) -> dict[str, str]:
    """Tensors that are not as their points declare; one layer of each kind."""
    wrong: dict[str, str] = {}
    sizes = {"batch": 2, "pos": LENGTH, "d_model": ours.cfg.d_model, "1": 1}
    for i, block in enumerate(ours.blocks):
        known: dict[tuple[str, str], int] = {}
        for name, x in cache.items():
            if not name.startswith(f"blocks.{i}."):
                continue
            axes, part = ours.hook_dict[name].axes, name.split(".")[2]
            why = misfit(axes, x, sizes | part_sizes(block, part))
            for axis, size in zip(axes or (), x.shape, strict=False):
                if axis in ("head", "kv_head", "expert", "d_mlp"):
                    before = known.setdefault((part.replace("hook", ""), axis), size)
                    why = why or ("" if before == size else f"{axis} is {size}, elsewhere {before}")
            if why:
                wrong.setdefault(kind_of(name), why)
    for name, x in cache.items():
        if not name.startswith("blocks.") and (why := misfit(ours.hook_dict[name].axes, x, sizes)):
            wrong[name] = why
    return wrong


def part_sizes(block: nn.Module, part: str) -> dict[str, int]:
    """What is known of a uniform attention's axes."""
    attn = block._modules.get("attn")
    if part != "attn" or not isinstance(attn, Attention):
        return {}
    spec = attn.spec
    return {"head": spec.n_heads, "kv_head": spec.n_kv_heads, "d_head": spec.d_head}


def misfit(axes: tuple[str, ...] | None, x: Tensor, sizes: dict[str, int]) -> str:
    """Why a tensor does not have these axes; nothing if it does."""
    if axes is None:
        return "no axes declared"
    if len(axes) != x.ndim:
        return f"shape {tuple(x.shape)} for axes {' '.join(axes)}"
    for axis, size in zip(axes, x.shape, strict=True):
        if sizes.get(axis, size) not in (size,) and not (axis == "batch" and size == 1):
            return f"{axis} is {size}, expected {sizes[axis]}"
    return ""


# Edits --------------------------------------------------------------------------------------------


def noisy(x: Tensor, size: float = 0.5, seed: int = 0) -> Tensor:
    """``x`` with noise of its own size; what is masked stays masked."""
    if not x.is_floating_point():
        return x
    masked = x < -1e30
    scale = x.masked_fill(masked, 0).abs().max().clamp(0.1, 10) * size
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)
    return torch.where(masked, x, x + scale * noise)


def edits(theirs: PreTrainedModel, ours: HookedTransformer, found: Finding) -> None:
    """Each point fires and its edit changes the logits, nobody else listening.

    One pass for all layers of a kind: in row i of the batch, only layer i is edited. The last row
    is edited nowhere and must come out as it does when nobody listens.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in ours.hook_dict:
        kinds[kind_of(name)].append(name)
    rows = 1 + max(len(names) for names in kinds.values())
    tokens = prompts(theirs)[0][:1].expand(rows, -1)
    plain = ours(tokens)[-1]
    dead: dict[str, str] = {}
    for kind, names in kinds.items():
        try:
            dead |= rows_without_effect(ours, tokens, plain, names)
        except (HookedLMError, RuntimeError, ValueError, TypeError) as error:
            dead[names[0]] = f"{type(error).__name__}: {short(str(error))}"
    layers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, why in dead.items():
        layers[kind_of(name), why].append(name.split(".")[1] if BLOCK.match(name) else "")
    for (kind, why), where in layers.items():
        found.faults.append(f"edits: {kind} ({','.join(where)}): {why}")


def rows_without_effect(
    ours: HookedTransformer, tokens: Tensor, plain: Tensor, names: list[str]
) -> dict[str, str]:
    """Those of ``names`` whose edit in their row changes nothing, and why."""
    fired: set[str] = set()
    alone: set[str] = set()

    def edit_row(row: int):
        def edit(x: Tensor, hook) -> Tensor | None:
            fired.add(hook.name)
            if x.shape[0] != len(tokens):
                alone.add(hook.name)
                return None
            x = x.clone()
            x[row] = noisy(x[row])
            return x

        return edit

    out = ours.run_with_hooks(tokens, fwd_hooks=[(n, edit_row(i)) for i, n in enumerate(names)])
    wrong = {}
    if (error := off(out[-1], plain)) > ROUNDING * 10:
        wrong[names[-1]] = f"a row that nobody edits is {error:.1e} away"
    for i, name in enumerate(names):
        if name not in fired:
            wrong[name] = "never fires"
        elif name in alone or not changed(out[i], out[-1]):
            if why := why_without_effect(ours, tokens[:2], plain, name):
                wrong[name] = why
        elif not out[i].isfinite().all():
            wrong[name] = "an edit gives NaN"
    return wrong


def changed(got: Tensor, before: Tensor) -> bool:
    """Whether logits differ by more than rounding."""
    return not off(got, before) <= EFFECT


def why_without_effect(
    ours: HookedTransformer, tokens: Tensor, plain: Tensor, name: str
) -> str:
    """A second look: this point alone, edited more strongly in every row."""
    for size, seed in ((0.5, 1), (5.0, 2), (5.0, 3)):
        out = ours.run_with_hooks(
            tokens, fwd_hooks=[(name, lambda x, hook, s=size, n=seed: noisy(x, s, n))]
        )
        if changed(out[-1], plain):
            return ""
    return "its edit changes nothing"


# Sums ---------------------------------------------------------------------------------------------


def ends_of(ours: HookedTransformer) -> list[tuple[int, bool]]:
    """Every (layer, mlp_input) that a decomposition can end at."""
    n = ours.cfg.n_layers
    mids = [i for i in range(n) if f"blocks.{i}.hook_resid_mid" in ours.hook_dict]
    return [(i, False) for i in range(n + 1)] + [(i, True) for i in mids]


def sums(theirs: PreTrainedModel, ours: HookedTransformer, found: Finding) -> None:
    """Parts sum to the stream, heads to attention's output, neurons and experts to the MLP's."""
    tokens, _, _ = prompts(theirs)
    written: dict[str, Tensor] = {}
    handles = [
        part.register_forward_hook(lambda _m, _a, out, n=f"{i}.{kind}": written.update({n: out}))
        for i, block in enumerate(ours.blocks)
        for kind in ("attn", "mlp")
        if isinstance(part := block._modules.get(kind), nn.Module)
        and not isinstance(block, OpaqueBlock)
    ]
    try:
        _, cache = ours.run_with_cache(tokens, names_filter=list(ours.hook_dict))
    finally:
        for handle in handles:
            handle.remove()
    wrong: dict[str, str] = {}
    for layer, mlp_input in ends_of(ours):
        point = "resid_pre" if layer < ours.cfg.n_layers else "resid_post"
        whole = cache["resid_mid" if mlp_input else point, min(layer, ours.cfg.n_layers - 1)]
        for how in (cache.decompose_resid, cache.get_full_resid_decomposition):
            with told(found, f"sums: {how.__name__}({layer}, {mlp_input})"):
                error = off(how(layer, mlp_input).sum(0), whole)
                if error > ROUNDING * 2:
                    wrong.setdefault(how.__name__, f"{error:.1e} at {layer}, mlp_input={mlp_input}")
    for i, block in enumerate(ours.blocks):
        for kind, total in parts_of(block, cache, i).items():
            if (error := off(total, written[f"{i}.{kind}"])) > ROUNDING * 2:
                wrong.setdefault(f"parts of {kind}", f"{error:.1e} in layer {i}")
    found.faults += [f"sums: {what}: {why}" for what, why in wrong.items()]


def parts_of(block: nn.Module, cache, i: int) -> dict[str, Tensor]:
    """What heads, and neurons or experts, sum to, biases included."""
    totals = {}
    attn, mlp = block._modules.get("attn"), block._modules.get("mlp")
    if isinstance(attn, Attention):
        totals["attn"] = cache["result", i].sum(-2) + (0 if attn.live("b_O") is None else attn.b_O)
    if isinstance(mlp, (MLP, GatedMLP)):
        b = mlp.live("b_out")
        totals["mlp"] = cache.get_neuron_results(i).sum(-2) + (0 if b is None else b)
    elif f"blocks.{i}.mlp.hook_expert_out" in cache:
        shared = f"blocks.{i}.mlp.hook_shared_out"
        total = cache[f"blocks.{i}.mlp.hook_expert_out"].sum(-2)
        totals["mlp"] = total + cache[shared] if shared in cache else total
    return totals


def logits_by_part(theirs: PreTrainedModel, ours: HookedTransformer, found: Finding) -> None:
    """What the parts of the stream add to a logit sums to it, before a softcap."""
    if ours.unembed is None or not isinstance(ours.ln_final, (Norm, type(None))):
        return
    if getattr(ours, "mlm_head", None) is not None:
        return
    tokens, _, _ = prompts(theirs)
    logits, cache = ours.run_with_cache(tokens)
    cap = ours.unembed.softcap
    logits = logits.double() if cap is None else torch.atanh(logits.double() / cap) * cap
    b = ours.ln_final.live("b") if isinstance(ours.ln_final, Norm) else None
    constant = ours.b_U if b is None else ours.b_U + b @ ours.W_U
    attrs = cache.logit_attrs(cache.decompose_resid(), 7)
    error = off(attrs.sum(0) + constant[7], logits[..., 7])
    if not error <= ROUNDING * 10:
        found.faults.append(f"logits_by_part: {error:.1e} away")


# Processing ---------------------------------------------------------------------------------------


def processing(build: Build, found: Finding) -> None:
    """The classic door keeps log-probabilities; what it skips, and why."""
    theirs = build(torch.float32)
    tokens, padded, mask = prompts(theirs)
    expected = truth_of(theirs, tokens).log_softmax(-1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = HookedTransformer.from_pretrained("survey", hf_model=theirs)
    found.skipped = [short(str(w.message), 400) for w in caught if w.category is UserWarning]
    away = float((ours(tokens).log_softmax(-1) - expected).abs().max())
    listening, _ = ours.run_with_cache(tokens, names_filter=list(ours.hook_dict))
    away = max(away, float((listening.log_softmax(-1) - expected).abs().max()))
    found.errors["processed"] = away
    if not away <= LOG_PROBS:
        found.faults.append(f"processing: log-probabilities {away:.1e} away")
