"""Several teachers for a language model, token by token, in Hugging Face's Trainer.

    pip install -c constraints.txt -e ".[examples]"
    python examples/language_model.py

trains two byte-level Llamas on the text of Python's own help pages, then a smaller one twice, alone
and in their classroom, to which a third mentor is added that is of no use: the first with its
vocabulary shuffled. `fused_linear_classroom_loss` takes last hidden states and the weights of the
heads, so that the logits [tokens, vocabulary] of student and mentors never exist as a whole. The
labels are shifted once, by the collator; the student's first tokens are a prompt, which is ignored.
"""

import argparse
import tempfile
from pydoc_data.topics import topics

import torch

from classroomkd import fused_linear_classroom_loss
from classroomkd.torchvision import import_torchvision

import_torchvision()  # transformers does, and fails if it was built for another torch

import transformers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402

LENGTH, PROMPT, BYTES = 128, 16, 256


class LanguageTrainer(Trainer):
    """Next-token cross-entropy without mentors, the classroom with them."""

    def __init__(self, *args, mentors=(), **kwargs):
        super().__init__(*args, **kwargs)
        self.mentors = [mentor.eval() for mentor in mentors]
        self.taught = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens, labels = inputs["input_ids"], inputs["labels"]
        hidden = model.model(tokens).last_hidden_state
        if self.mentors and model.training:
            with torch.no_grad():
                heads = [
                    (m.model(tokens).last_hidden_state, m.lm_head.weight) for m in self.mentors
                ]
            loss, report = fused_linear_classroom_loss(
                hidden,
                model.lm_head.weight,
                heads,
                labels,
                task_weight=1.0,
                mentor_weight="auto",
                temperature=4.0,
                return_report=True,
            )
            self.taught.append(report.active_share)
        else:
            logits = model.lm_head(hidden)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return (loss, {"logits": hidden}) if return_outputs else loss


def texts():
    """Training and held-out sequences of LENGTH + 1 bytes."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    tokens = torch.tensor([*text]).unfold(0, LENGTH + 1, LENGTH)
    held_out = torch.arange(len(tokens)) % 10 == 0
    return [*tokens[~held_out]], [*tokens[held_out]]


def collate(sequences):
    tokens = torch.stack(sequences)
    labels = tokens[:, 1:].clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": tokens[:, :-1], "labels": labels}


def llama(size, layers):
    sizes = {"hidden_size": size, "intermediate_size": 2 * size, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=BYTES, num_attention_heads=4, **sizes))


def shuffled(model):
    """The same network with its vocabulary in another order: a mentor that is always wrong."""
    other = LlamaForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.lm_head.weight.copy_(model.lm_head.weight[torch.randperm(BYTES)])
    return other


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train, held_out = texts()

    def perplexity(model, mentors=()):
        """Of held-out bytes, after training; and the mean share of tokens each mentor taught."""
        transformers.set_seed(arguments.seed)
        settings = TrainingArguments(
            folder,
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            learning_rate=3e-3,
            remove_unused_columns=False,
            seed=arguments.seed,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
        )
        trainer = LanguageTrainer(
            model,
            settings,
            data_collator=collate,
            train_dataset=train,
            eval_dataset=held_out,
            mentors=mentors,
        )
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        return 2.718281828459045**loss, torch.stack(trainer.taught or [torch.zeros(0)]).mean(0)

    with tempfile.TemporaryDirectory() as folder:
        transformers.set_seed(arguments.seed)
        teacher, peer = llama(128, layers=2), llama(64, layers=2)
        results = {"teacher": perplexity(teacher)[0], "peer": perplexity(peer)[0]}
        transformers.set_seed(arguments.seed)
        alone, student = llama(48, layers=1), llama(48, layers=1)
        student.load_state_dict(alone.state_dict())
        results["student alone"] = perplexity(alone)[0]
        results["in the classroom"], shares = perplexity(
            student, [teacher, peer, shuffled(teacher)]
        )
    print(
        ", ".join(f"{name} {value:.2f}" for name, value in results.items()), "perplexity per byte"
    )
    names = ("teacher", "peer", "shuffled teacher")
    print(
        "taught:",
        ", ".join(f"{n} {s:.1%}" for n, s in zip(names, shares, strict=True)),
        "of tokens",
    )
