"""ClassroomKD in a subclass of Hugging Face's Trainer, on synthetic sentences.

    pip install -c constraints.txt -e ".[examples]"
    python examples/hugging_face.py

Trains two small BERTs and, on a quarter of their sentences, a smaller one twice: alone and with the
first two as mentors. Nothing is downloaded. Half of a sentence's words belong to its class, the
others to any class. Mentors help most if they know more than the student's few sentences show. With
four classes, the mentor weight should be below the paper's 1: here 3/8. ``--seed`` sets the
sentences and the initial weights.
"""

import argparse
import copy
import tempfile

import torch

from classroomkd import ClassroomLoss
from classroomkd.torchvision import import_torchvision

import_torchvision()  # transformers imports it too, and fails with another build of torch

import transformers  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

CLASSES, WORDS, LENGTH = 4, 64, 16


class ClassroomTrainer(Trainer):
    """A Trainer whose model learns from ``mentors``, which get the same inputs."""

    loss_is_scaled_for_ga = False  # a mean over the batch, which gradient accumulation divides

    def __init__(self, *args, mentors, **kwargs):
        super().__init__(*args, **kwargs)
        self.mentors = [mentor.to(self.args.device).eval() for mentor in mentors]
        self.classroom_loss = ClassroomLoss(temperature=12.0, mentor_weight=0.375)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss  # the model's own loss, for evaluation
        if model.training:
            with torch.no_grad():
                mentor_logits = [mentor(**inputs).logits for mentor in self.mentors]
            loss = self.classroom_loss(outputs.logits, mentor_logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def sentences(count):
    labels = torch.randint(CLASSES, (count, 1))
    words = torch.randint(WORDS, (count, LENGTH))
    of_class = words - words % CLASSES + labels
    words = torch.where(torch.rand(count, LENGTH) < 0.5, of_class, words)
    return [{"input_ids": w, "labels": y} for w, y in zip(words, labels[:, 0], strict=True)]


def bert(size, layers):
    sizes = {"hidden_size": size, "intermediate_size": 2 * size, "num_hidden_layers": layers}
    config = BertConfig(vocab_size=WORDS, num_labels=CLASSES, num_attention_heads=2, **sizes)
    return BertForSequenceClassification(config)


def accuracy(result):
    return {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())}


def fit(trainer):
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = {"num_train_epochs": arguments.epochs, "learning_rate": 3e-3}
    settings |= {
        "seed": arguments.seed,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    transformers.set_seed(arguments.seed)
    options = {"train_dataset": sentences(1024), "eval_dataset": sentences(1024)}
    with tempfile.TemporaryDirectory() as folder:
        options |= {"args": TrainingArguments(folder, **settings), "compute_metrics": accuracy}
        mentors = [bert(64, layers=2), bert(48, layers=1)]
        teacher, peer = (fit(Trainer(mentor, **options)) for mentor in mentors)
        # The student has a quarter of the sentences, and twice the epochs.
        settings["num_train_epochs"] *= 2
        options["args"] = TrainingArguments(folder, **settings)
        options["train_dataset"] = options["train_dataset"][:256]
        student = bert(32, layers=1)
        alone = fit(Trainer(copy.deepcopy(student), **options))
        taught = fit(ClassroomTrainer(student, mentors=mentors, **options))
    print(
        f"held-out accuracy: mentors {teacher:.4f}, {peer:.4f}, student alone {alone:.4f}, "
        f"in the classroom {taught:.4f}"
    )
