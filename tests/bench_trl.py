"""A step of stage 3 against a step of TRL's GRPOTrainer, on the same tiny Qwen2.5-VL. Prints a table, and a JSON line last.

    pip install trl==1.16.0 torchvision==0.28.0    # for this benchmark only; torchvision goes with torch 2.13.0
    python tests/bench_trl.py                      # about five minutes on one CPU core, 5 million random weights

Both sides have the same weights, float32, LoRA on the same modules, AdamW with the same rate, no gradient checkpointing, and
the same question about one picture: P tokens. A step is all that an optimiser step needs: read and encode the picture, sample
G completions of C tokens (nobody ends early), reward, score under policy and reference (adapter off), backward, update.
Ours is the loop of stage3_grpo.py itself, without its checkpoint and curves; TRL's is GRPOTrainer.train(), with --rows rows in
a forward and gradients accumulated over the rest. They alternate in one process, after a warm-up of each.

seconds      median over the pairs; the ratio is the median of the pairs' ratios
vision       seconds of them in the vision tower, mean of all steps: we run it once a step, TRL once for each row in sampling,
             once in the reference and once in the policy. The tiny model's tower is dear, so the ratio is given without it, too
peak_mb      largest resident set (VmHWM) of two steps, each side in a process of its own with the same imports
above_mb     by how much it is above what was resident before the first step: libraries and weights are not in it
difference   of the losses, and of the gradients (norm over norm, the worst weight), on one batch: the same completions of
             unequal length, advantages and weights, with a policy unlike the reference and unlike the one that sampled
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import bench_branches  # finds the repository, too
import numpy as np
import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from tqdm import tqdm
from transformers import PrinterCallback, Qwen2_5_VLForConditionalGeneration, TrainerCallback

import common
import stage3_grpo
from support import runs

try:
    from datasets import Dataset, Image
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise SystemExit(f"This benchmark needs: pip install trl==1.16.0 torchvision==0.28.0 ({error})") from None

# As Qwen2.5-VL's own, for one system and one user message whose picture comes first.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def reward(text):
    """The share of the letter e in a completion: it differs within a group even with random weights."""
    return text.count("e") / max(len(text), 1)


def prepare(folder, asked):
    """Our side: backbone with LoRA, settings, and the one prompt, a (Scene, Example). The model's folder is made, too."""
    backbone = bench_branches.build(folder)
    path = bench_branches.picture(folder, asked.prefix - 32)  # the words take the rest
    example = common.Example("one", (path,), "single_image", "object count", "How many chairs are there?", None, "1")
    scene = common.Scene((path,), "single_image", [example])
    settings = stage3_grpo.GRPOSettings(
        load="fp32", train_batch=1, group_size=asked.group, max_new_tokens=asked.completion, steps=1, warmup=0.0, eval_every=10**9
    )
    common.adapt(backbone, settings)
    return backbone, settings, (scene, example)


def our_step(backbone, settings, prompt, folder):
    """One step of stage 3's own loop. Returns its seconds, as it logs them."""
    settings.seed += 1
    settings.out = str(folder)
    stage3_grpo.grpo(backbone, [prompt], [], [], settings, runs.Run(settings, {}))
    row = common.read_jsonl(folder / "metrics.jsonl")[-1]
    return row["rollout_seconds"] + row["update_seconds"]


def strip_our_loop():
    """Let stage 3's loop pay our reward, write no checkpoint and no curves, and say nothing."""
    stage3_grpo.rewards = lambda texts, *_: {"accuracy": np.array([reward(text) for text in texts])}
    runs.Run.save = runs.draw_curves = common.print0 = runs.print0 = lambda *_: None
    runs.tqdm = lambda steps, **_: tqdm(steps, disable=True)


def count_seconds(module):
    """A list that gets the seconds of every forward of `module`."""
    seconds, forward = [], module.forward

    def run(*args, **kwargs):
        took, out = bench_branches.timed(lambda: forward(*args, **kwargs))
        seconds.append(took)
        return out

    module.forward = run
    return seconds


def make_trainer(folder, backbone, settings, prompt, steps, rows):
    """TRL's trainer for `steps` steps of the same, from the model's folder with our side's settings; `rows` in a forward."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = type(backbone.tokenizer).from_pretrained(folder, padding_side="left")
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor.from_pretrained(folder), tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE
    )
    scene, example = prompt
    messages = [
        {"role": "system", "content": common.SYSTEM},
        {"role": "user", "content": common.prompt_text(example, "think")},
    ]
    data = Dataset.from_dict({"prompt": [messages] * steps, "image": [scene.images[0]] * steps}).cast_column("image", Image())
    config = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=steps, seed=0,
        per_device_train_batch_size=rows, gradient_accumulation_steps=settings.group_size // rows,
        num_generations=settings.group_size,
        num_iterations=1, use_bias_correction_kl=False,  # TRL's default multiplies the KL by the ratio: not DeepSeekMath's
        max_completion_length=settings.max_new_tokens, temperature=settings.temperature, top_p=1.0, top_k=0,
        generation_kwargs={"min_new_tokens": settings.max_new_tokens,
                           "suppress_tokens": backbone.forbidden.nonzero()[:, 0].tolist()},
        learning_rate=settings.lr, lr_scheduler_type="constant", optim="adamw_torch", max_grad_norm=settings.clip,
        beta=settings.beta, epsilon=settings.epsilon_low, loss_type="grpo", dataloader_pin_memory=False,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=common.LORA_TARGETS, task_type="CAUSAL_LM"
    )
    trainer = GRPOTrainer(
        model, lambda completions, **_: [reward(completion[0]["content"]) for completion in completions], config, data,
        processing_class=processor, peft_config=lora,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


class Alternate(TrainerCallback):
    """Takes the time of each step of TRL, from the end of the one before (the data are read there), and runs one of ours."""

    def __init__(self, ours):
        """ours: a function that runs one step of ours and returns its seconds."""
        self.ours, self.pairs = ours, []

    def on_train_begin(self, *_, **__):
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        """Note the pair of seconds: ours, TRL's."""
        theirs = time.perf_counter() - self.began
        self.pairs.append((self.ours(), theirs))
        print("ours {:.2f} s, TRL {:.2f} s".format(*self.pairs[-1]), flush=True)
        self.began = time.perf_counter()


def memory(side, asked):
    """Peak resident set in MB of two steps of a side ("ours" or "trl"), and how far that is above the set before them."""
    torch.set_num_threads(1)
    strip_our_loop()
    folder = Path(tempfile.mkdtemp())
    backbone, settings, prompt = prepare(folder, asked)
    trainer = make_trainer(folder, backbone, settings, prompt, 2, asked.rows) if side == "trl" else None

    def resident(name):
        return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    if trainer:
        trainer.train()
    else:
        for _ in range(2):
            our_step(backbone, settings, prompt, folder)
    return resident("VmHWM"), resident("VmHWM") - before


def compare(backbone, settings, prompt, trainer):
    """Differences (loss, gradient) of the two sides on one batch, and the loss itself."""
    torch.manual_seed(7)
    for name, weight in backbone.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)  # away from the reference
    set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(backbone.model))
    group, longest = settings.group_size, settings.max_new_tokens
    lengths = [longest - i * longest // (2 * group) for i in range(group)]
    words = torch.randint(7, len(backbone.tokenizer), (group, longest))  # 7: behind the special tokens
    completions = [row[:length].tolist() for row, length in zip(words, lengths)]
    advantages = stage3_grpo.group_advantages(torch.rand(1, group))[0]  # (G,)

    scene, example = prompt
    text = common.prompt_text(example, "think") + common.BRANCH_END
    prefix = common.encode_scenes(backbone, [scene])[0]
    prefix = common.extend_prefix(prefix, list(common.encode_text(backbone.tokenizer, text)))
    branches = [[([], ids) for ids in completions]]
    with torch.no_grad(), backbone.model.disable_adapter():
        reference = common.branch_logprobs(backbone, [prefix], branches)[0]
    backbone.model.train()
    logps, _, mask = common.branch_logprobs(backbone, [prefix], branches)  # (G, C)
    old = logps.detach() + 0.2 * torch.randn(logps.shape) * mask  # about a third of the ratios leave the clip
    ours, _ = stage3_grpo.grpo_loss(logps, old, reference, advantages, mask, settings, group, int(mask.sum()))
    ours.backward()

    row = next(iter(trainer.train_dataset))
    content = [{"type": "image"}, {"type": "text", "text": row["prompt"][1]["content"]}]
    messages = [row["prompt"][0], {"role": "user", "content": content}]
    prompts = [trainer.processing_class.apply_chat_template(messages, add_generation_prompt=True)] * group
    encoded = dict(trainer.processing_class(images=[[row["image"]]] * group, text=prompts, return_tensors="pt"))
    if encoded["input_ids"][0].tolist() != prefix.ids.tolist():
        raise SystemExit("The two sides do not read the same prompt.")
    kinds = torch.nn.functional.pad(encoded["mm_token_type_ids"], (0, longest))
    tokens, seen = words * mask, mask.long()
    extra = {
        "pixel_values": encoded["pixel_values"], "image_grid_thw": encoded["image_grid_thw"], "num_images": [1] * group,
        "mm_token_type_ids": kinds,
    }  # fmt: skip
    model = trainer.model.train()
    with torch.no_grad(), model.disable_adapter():
        whole, attended = torch.cat([encoded["input_ids"], tokens], 1), torch.cat([encoded["attention_mask"], seen], 1)
        reference = trainer._get_per_token_logps_and_entropies(model, whole, attended, longest, **extra)[0]
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer.compute_loss(model, extra | {
        "prompt_ids": encoded["input_ids"], "prompt_mask": encoded["attention_mask"], "completion_ids": tokens,
        "completion_mask": seen, "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference,
    })  # fmt: skip
    model.zero_grad(set_to_none=True)
    theirs.backward()
    gradients = [dict((n, p.grad) for n, p in m.named_parameters() if p.requires_grad) for m in (backbone.model, model)]
    apart = [((gradients[0][n] - g).norm() / g.norm()).item() for n, g in gradients[1].items()]
    return abs(ours.item() - theirs.item()), max(apart), theirs.item()


def main():
    """Memory of each side alone, then alternating steps, then one batch through both losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--rows", type=int, help="completions in one forward of TRL; default: the group")
    parser.add_argument("--pairs", type=int, default=5)
    asked = parser.parse_args()
    asked.rows = asked.rows or asked.group
    torch.set_num_threads(1)
    peaks = {}
    for side in ("ours", "trl"):  # spawned, not forked: nothing of this process is counted
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peaks[side] = pool.submit(memory, side, asked).result()

    strip_our_loop()
    folder = Path(tempfile.mkdtemp())
    backbone, settings, prompt = prepare(folder, asked)
    trainer = make_trainer(folder, backbone, settings, prompt, asked.pairs + 1, asked.rows)
    alternate = Alternate(lambda: our_step(backbone, settings, prompt, folder))
    trainer.add_callback(alternate)
    towers = [count_seconds(common.unwrap(model).model.visual) for model in (backbone.model, trainer.model)]
    trainer.train()
    our_tower, their_tower = [sum(seconds) / len(alternate.pairs) for seconds in towers]
    ours, theirs = zip(*alternate.pairs[1:])  # the first is the warm-up
    loss_difference, gradient_difference, loss = compare(backbone, settings, prompt, trainer)
    prefixes, _ = stage3_grpo.rollout(backbone, [prompt], settings)
    out = {
        "P": len(prefixes[0].ids), "C": asked.completion, "G": asked.group, "rows": asked.rows, "pairs": asked.pairs,
        "ours_seconds": statistics.median(ours), "trl_seconds": statistics.median(theirs),
        "speedup": statistics.median(slow / fast for fast, slow in zip(ours, theirs)),
        "ours_vision_seconds": our_tower, "trl_vision_seconds": their_tower,
        "ours_peak_mb": peaks["ours"][0], "trl_peak_mb": peaks["trl"][0],
        "ours_above_mb": peaks["ours"][1], "trl_above_mb": peaks["trl"][1],
        "loss": loss, "loss_difference": loss_difference, "gradient_difference": gradient_difference,
        "versions": {name: version(name) for name in ("trl", "torch", "transformers", "peft", "torchvision")},
    }  # fmt: skip
    out["speedup_without_vision"] = (out["trl_seconds"] - their_tower) / (out["ours_seconds"] - our_tower)
    print(f"\nP {out['P']}, C {out['C']}, G {out['G']}\n      seconds  vision  peak_mb  above_mb")
    for side, name in (("ours", "ours"), ("TRL", "trl")):
        print(f"{side:5}{out[name + '_seconds']:8.2f}{out[name + '_vision_seconds']:8.2f}", end="")
        print(f"{out[name + '_peak_mb']:9.0f}{out[name + '_above_mb']:10.0f}")
    print(f"ratio{out['speedup']:8.2f}, without the vision tower {out['speedup_without_vision']:.2f}")
    print(f"loss {loss:.6f}, difference {loss_difference:.1e}; gradient, difference {gradient_difference:.1e}")
    print(json.dumps(out))


if __name__ == "__main__":
    main()
