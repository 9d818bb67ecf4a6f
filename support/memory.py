"""What training and answering need of memory at their largest, before they start."""

import math
from types import SimpleNamespace

import psutil
import torch
from transformers import AutoConfig, AutoTokenizer, Qwen2VLImageProcessorPil

import common
from common import print0
from support import runs


def scene_length(backbone, scene):
    """Tokens of a scene's prefix (at most, if it has times), from the size of its first picture. Raises SystemExit if that
    cannot be read."""
    processor, video, count = backbone.processor, scene.data_type == "video", len(scene.images)
    side = processor.patch_size * processor.merge_size  # pixels of a token
    if common.is_video(scene.images[0]):
        tokens, count = processor.size["longest_edge"] // side**2, backbone.frames  # at most
    else:
        tokens = math.prod(common.resized_size(processor, *common.picture_size(scene.images[0]))) // side**2
    pictures = math.ceil(count / 2) if video else count
    timed = video and backbone.family.timed
    around = 2 + timed * len(common.encode_text(backbone.tokenizer, "<9999.9 seconds>"))  # tokens around a vision span
    spans = 1 if video and not timed else pictures
    return len(common.encode_text(backbone.tokenizer, common.PREFIX_START)) + spans * around + pictures * tokens


def pack_lengths(backbone, packs):
    """Token counts of packs: [(prefix, [(prompt, completion), ...]), ...]."""
    prefixes = {id(scene): scene_length(backbone, scene) for scene in {id(pack.scene): pack.scene for pack in packs}.values()}
    return [(prefixes[id(pack.scene)], [(len(prompt), len(text)) for prompt, text in pack.pairs]) for pack in packs]


def cached_numbers(text):
    """Numbers that a token's keys and values have in all layers. text: the language model's configuration."""
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * width


def stored_by_layer(backbone, prefixes, branches):
    """Bytes that autograd stores for ONE layer of the language model, counted while it runs on zeros.

    prefixes, branches: token counts as in common.pack_layout.
    """
    model, stored = common.unwrap(backbone.model), {}
    text, width = model.model.language_model, model.config.text_config.hidden_size
    layout = common.pack_layout(prefixes, branches, backbone.device)
    tokens, like = len(layout.unpad), {"dtype": model.dtype, "device": backbone.device}
    hidden = torch.zeros(1, tokens, width, requires_grad=True, **like)  # (1, T, width)
    angles = text.rotary_emb(hidden, torch.zeros(3, 1, tokens, dtype=torch.long, device=backbone.device))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            stored[memory.data_ptr()] = memory.nbytes(), tensor  # the tensor is kept, so that its address is not used again
        return tensor

    backbone.model.eval()  # in train mode with checkpointing nothing would be stored
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        text.layers[0](hidden, position_embeddings=angles, layout=layout)
    return sum(size for size, _ in stored.values())


def memory_budget(backbone, settings, prefixes, branches, learnt, cached):
    """Bytes that training needs at its largest: ({part: bytes}, peak). Not all parts exist at the same time.

    prefixes, branches: token counts of the largest micro-batch, as in common.pack_layout; learnt: its completion tokens, whose
    logits are computed. cached: tokens whose keys and values are stored while answers are generated.
    Not counted: the vision tower's activations (frozen: they are freed before) and features that are kept.
    """
    model = common.unwrap(backbone.model)
    text, number, trained = model.config.text_config, model.dtype.itemsize, [p for p in model.parameters() if p.requires_grad]
    layers, tokens = text.num_hidden_layers, sum(prefixes) + sum(map(sum, branches))
    layer, adapted = stored_by_layer(backbone, prefixes, branches), [m for m in model.modules() if hasattr(m, "lora_A")]
    inner = tokens * text.intermediate_size * 2 * 4  # gradients inside a layer: two float32 tensors
    if settings.checkpointing:  # the input of each layer is stored; the backward pass runs one layer again
        stored, inner = layers * tokens * text.hidden_size * number, layer + inner
    else:
        stored = layers * layer
    parts = {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        # Gradients, AdamW's two averages (Muon has one), and a float32 copy if the weights are bf16; see make_optimizers.
        "optimizer": sum(p.numel() * (p.element_size() + 8 + 4 * (p.element_size() < 4)) for p in trained),
        "cache": cached * cached_numbers(text) * number,
        # The copy of common.merged_layers; check_memory does without it where there is no room.
        "merged": sum(m.in_features * m.out_features for m in adapted) * number * backbone.merge_decoding,
        "activations": stored + inner,
        "logits": min(learnt, common.LOGITS_AT_ONCE) * text.vocab_size * 3 * 4,  # three float32 tensors
    }
    learning = stored + max(inner, parts["logits"])  # the logits are freed before the gradients reach the layers
    updating = sum(p.numel() * (4 - p.element_size()) for p in trained)  # gradients become float32
    return parts, parts["weights"] + parts["optimizer"] + max(learning, parts["cache"] + parts["merged"], updating)


LOWER = {  # what to change if a part of the budget is the largest
    "weights": "--load 4bit",
    "optimizer": "--tune lora, or a lower --lora_rank",
    "cache": "a lower --eval_batch (scoring), or --train_batch, --max_new_tokens and --group_size (stage 3)",
    "activations": "--checkpointing true, then a lower --micro_batch, --max_picture_tokens and --branches (stage 3: "
                   "--max_new_tokens)",
}


def device_memory(device):
    """Bytes that this process can use: of the GPU (within torch.cuda.set_per_process_memory_fraction), or its share of RAM."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return min(free + torch.cuda.memory_reserved(device), whole * torch.cuda.get_per_process_memory_fraction(device))
    ram, own = psutil.virtual_memory(), psutil.Process().memory_info()
    limits = runs.cgroup_limits("memory", "memory.max") + runs.cgroup_limits("memory", "memory.limit_in_bytes")
    most = min([ram.total, *(limit for (limit,) in limits)]) / runs.world_size()
    # Weights that are mapped from a file (`shared`) are available already: the system may drop and read them again.
    return min(most, ram.available / runs.world_size() + own.rss - getattr(own, "shared", 0))


def check_memory(backbone, settings, lengths, new_tokens, rollout=0):
    """Print one line about the memory that training needs at its largest, before it starts.

    lengths: token counts of all packs, as from pack_lengths; new_tokens: of the longest answer when scoring; rollout: tokens
    that a rollout stores (each prefix once). Raises SystemExit, naming the settings to lower, if there is not enough.
    """
    ordered = sorted(lengths, key=lambda pack: pack[0] + sum(map(sum, pack[1])))
    largest = ordered[-min(settings.micro_batch, settings.train_batch) :]
    scoring = settings.eval_batch * (max(prefix for prefix, _ in lengths) + new_tokens)  # each with its own pictures
    budget = (
        backbone, settings, [prefix for prefix, _ in largest], [[sum(pair) for pair in pairs] for _, pairs in largest],
        sum(text for _, pairs in largest for _, text in pairs), max(scoring, rollout),
    )  # fmt: skip
    (parts, peak), available = memory_budget(*budget), device_memory(backbone.device)
    if peak > available and parts["merged"]:
        print0("no room for a merged copy of the adapted layers: decoding goes on without it, slower")
        backbone.merge_decoding = False
        parts, peak = memory_budget(*budget)
    line = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in parts.items())
    print0(f"memory in MB: {line}, not all at the same time; at most {peak / 1e6:,.0f} of {available / 1e6:,.0f}")
    if peak > available:
        most = max(LOWER, key=parts.get)
        raise SystemExit(f"This needs {peak / 1e9:.1f} GB of {available / 1e9:.1f} GB. Most is {most}: try {LOWER[most]}.")


def check_answers(path, load, scenes, mode, settings, new_tokens, min_picture_tokens=None, max_picture_tokens=None):
    """Print one line about the memory that answering needs at its largest, before the weights of `path` are loaded.

    scenes: those of this process, as answer_batches gets them. Counted are the weights, and for the largest batch the cache (each
    prefix once, then a prompt and new_tokens for each question), the logits, and the activations of the vision tower or of the
    language model on the prefixes.
    Sets settings.eval_batch if it is 0. Raises SystemExit, naming the settings to lower, if there is not enough.
    """
    common.check_model_folder(path, load)
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
        processor, family = Qwen2VLImageProcessorPil.from_pretrained(path), common.family_of(config)
        common.limit_pictures(processor, min_picture_tokens, max_picture_tokens)
        with torch.device("meta"):  # shapes without memory
            model = family.model(config)
    except Exception:  # load_backbone says what is wrong with the folder
        return
    text, size = config.text_config, 4 if load == "fp32" else 2
    numbers = sum(parameter.numel() for parameter in model.parameters())
    settings.eval_batch = settings.eval_batch or (256 if numbers < 1e8 else 16)
    linear = sum(m.weight.numel() for m in model.model.language_model.modules() if isinstance(m, torch.nn.Linear))
    weights = numbers * size - (linear * (2 - 0.516) if load == "4bit" else 0)  # nf4 and its scales: 0.516 bytes a number
    token = cached_numbers(text) * size  # cache
    layer = (3 * text.intermediate_size + 5 * text.hidden_size) * size  # a token inside a layer
    # A token of a picture is merge x merge patches in float32, read, copied, and read ahead. In the vision tower the MLP or the
    # rotary embedding (seven tensors in float32) needs most.
    wide, *shape = model.model.visual.patch_embed.proj.weight.shape  # of the tower, and of a patch
    inner = max(m.out_features for m in model.model.visual.blocks[0].mlp.modules() if isinstance(m, torch.nn.Linear))
    tower = processor.merge_size**2 * (3 * math.prod(shape) * 4 + max(3 * (wide + inner) * size, 28 * wide))
    light = SimpleNamespace(tokenizer=tokenizer, processor=processor, frames=settings.frames, family=family)
    batches = []
    list(runs.answer_batches(None, scenes, mode, 0, eval_batch=settings.eval_batch, skip=lambda part: batches.append(part) or True))
    prompts = [common.prompt_text(e, mode) + common.BRANCH_END for scene in scenes for e in scene.examples]
    answer = max(map(len, tokenizer(prompts)["input_ids"])) + new_tokens if prompts else 0
    parts, peak = {"weights": weights, "cache": 0, "activations": 0, "logits": 0}, 0
    for part in batches:
        prefix, count = sum(scene_length(light, scene) for scene in part), sum(len(scene.examples) for scene in part)
        cache, logits = (prefix + count * answer) * token, count * text.vocab_size * 3 * 4  # three float32 tensors
        for name, value in (("cache", cache), ("activations", prefix * max(tower, layer)), ("logits", logits)):
            parts[name] = max(parts[name], value)
        peak = max(peak, prefix * tower, prefix * (token + layer), cache + logits)
    peak, available = weights + peak, device_memory(torch.device(runs.device()))
    line = ", ".join(f"{name} {part / 1e6:,.0f}" for name, part in parts.items())
    print0(f"{path} in {load}, --eval_batch {settings.eval_batch}: memory in MB: {line}, not all at the same time; at most "
           f"{peak / 1e6:,.0f} of {available / 1e6:,.0f}")  # fmt: skip
    if peak > available:
        lower = {"weights": "--load 4bit (or bf16), or fewer --processes", "cache": "a lower --eval_batch or --max_new_tokens",
                 "activations": "a lower --eval_batch, --max_picture_tokens or --frames",
                 "logits": "a lower --eval_batch"}  # fmt: skip
        most = max(lower, key=parts.get)
        raise SystemExit(f"This needs {peak / 1e9:.1f} GB of {available / 1e9:.1f} GB. Most is {most}: try {lower[most]}.")
    runs.barrier()  # what the others load must not count as used
