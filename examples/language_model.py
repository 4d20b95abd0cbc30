"""Three mentors for a language model, token by token, in Hugging Face's Trainer.

    pip install -c constraints.txt -e ".[examples]"
    python examples/language_model.py

Two Llamas learn the characters of Python's help pages. A smaller one learns those of a twentieth of
the pages, alone and in their classroom, which has a faulty third mentor: the first one with its
vocabulary shuffled. `check_logits` reports it, and the knowledge filter excludes it token by token.
The logits of all tokens never exist at once: `fused_linear_classroom_loss` takes hidden states and
the weights of the heads. The collator shifts the labels, once; the first characters of a sequence
are its prompt and are not labels. Mentor weight and temperature are those of the other examples
with few classes; the learning rate was chosen with seed 10. docs/teaching.md has other seeds.
"""

import argparse
import collections
import math
import tempfile
from pydoc_data.topics import topics

import torch
from torch.nn.functional import cross_entropy

from classroomkd import fused_linear_classroom_loss
from classroomkd.torchvision import import_torchvision
from classroomkd.training.mentor_check import check_logits

import_torchvision()  # transformers does, and fails if it was built for another torch
import transformers as hf  # noqa: E402

LENGTH, PROMPT, VOCABULARY = 64, 8, 40
OPTIONS = {"temperature": 4.0, "mentor_weight": "auto", "task_weight": 1.0}


class LanguageTrainer(hf.Trainer):
    """Cross-entropy without mentors, the classroom with them."""

    loss_is_scaled_for_ga = False  # a mean over the batch, which gradient accumulation divides

    def __init__(self, *args, mentors=(), **kwargs):
        super().__init__(*args, **kwargs)
        self.mentors = [m.to(self.args.device).eval().requires_grad_(False) for m in mentors]
        self.taught = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens, labels = inputs["input_ids"], inputs["labels"]
        hidden = model.model(tokens).last_hidden_state
        if not (model.training and self.mentors):
            loss = cross_entropy(model.lm_head(hidden).flatten(0, 1), labels.flatten())
            return (loss, {}) if return_outputs else loss
        heads = [(m.model(tokens).last_hidden_state, m.lm_head.weight) for m in self.mentors]
        loss, report = fused_linear_classroom_loss(
            hidden, model.lm_head.weight, heads, labels, return_report=True, **OPTIONS
        )
        self.taught.append(report.active_share)
        return loss


def texts():
    """Training and held-out sequences of LENGTH + 1 characters; rare characters are left out."""
    text = "\n".join(topics[name] for name in sorted(topics)).lower()
    symbols = [symbol for symbol, _ in collections.Counter(text).most_common(VOCABULARY)]
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    sequences = torch.tensor([ids[c] for c in text if c in ids]).unfold(0, LENGTH + 1, LENGTH)
    held_out = torch.arange(len(sequences)) % 10 == 0
    return symbols, sequences[~held_out], sequences[held_out][:256]


def collate(sequences):
    tokens = torch.stack(sequences)
    labels = tokens[:, 1:].clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": tokens[:, :-1], "labels": labels}


def llama(size, layers):
    sizes = {"hidden_size": size, "intermediate_size": 2 * size, "num_hidden_layers": layers}
    config = hf.LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=2, **sizes)
    return hf.LlamaForCausalLM(config)


def shuffled(model):
    """The same network with its vocabulary in another order."""
    other = hf.LlamaForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    order = torch.randperm(VOCABULARY, device=model.device)
    other.lm_head.weight.data.copy_(model.lm_head.weight[order])
    return other.to(model.device)


@torch.no_grad()
def check(mentors, sequences, symbols):
    batch = collate([*sequences])
    logits = {
        name: mentor(batch["input_ids"].to(mentor.device)).logits
        for name, mentor in mentors.items()
    }
    return check_logits(logits, batch["labels"], list(map(repr, symbols)), row="token")


def settings(steps, seed, folder):
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "remove_unused_columns": False,
        "seed": seed,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
    }


def fit(model, sequences, held_out, settings, mentors=(), **others):
    """Perplexity on the held-out characters, and the share of tokens each mentor taught."""
    arguments = hf.TrainingArguments(**settings | others)
    data = {"train_dataset": [*sequences], "eval_dataset": [*held_out]}
    trainer = LanguageTrainer(model, arguments, data_collator=collate, mentors=mentors, **data)
    trainer.train()
    shares = torch.stack(trainer.taught).mean(0).tolist() if mentors else []
    return math.exp(trainer.evaluate()["eval_loss"]), shares


def main(steps, seed, folder):
    symbols, pages, held_out = texts()
    common = held_out, settings(steps, seed, folder)
    hf.set_seed(seed)
    teacher, peer, alone = llama(96, layers=2), llama(64, layers=1), llama(32, layers=1)
    student = llama(32, layers=1)
    student.load_state_dict(alone.state_dict())
    found = {
        "teacher": fit(teacher, pages, *common, learning_rate=3e-3)[0],
        "peer": fit(peer, pages, *common)[0],
    }
    mentors = {"teacher": teacher, "peer": peer, "shuffled": shuffled(teacher)}
    few = pages[: len(pages) // 20]
    found["student alone"], _ = fit(alone, few, *common)
    found["in the classroom"], shares = fit(student, few, *common, [*mentors.values()])
    print(*check(mentors, held_out, symbols), sep="\n")
    print("held-out perplexity:", ", ".join(f"{name} {p:.3f}" for name, p in found.items()))
    taught = zip(mentors, shares, strict=True)
    print("tokens taught:", ", ".join(f"{name} {share:.1%}" for name, share in taught))


def run(main):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        main(arguments.steps, arguments.seed, scratch)


if __name__ == "__main__":
    run(main)
