"""ClassroomKD in a subclass of Hugging Face's Trainer, on synthetic sentences.

    pip install -c constraints.txt -e ".[examples]"
    python examples/hugging_face.py
Seeds 10 to 12 chose temperature 4 and 128 sentences for students; docs/teaching.md has seeds 0–4.
"""

import tempfile

import torch

from classroomkd import ClassroomLoss
from classroomkd.torchvision import import_torchvision

import_torchvision()  # transformers does, and fails if it was built for another torch
import transformers as hf  # noqa: E402


class ClassroomTrainer(hf.Trainer):  # with few classes mentors weigh "auto", 1/4 here, and not 1
    loss_is_scaled_for_ga = False  # a mean over the batch, which gradient accumulation divides

    def __init__(self, *args, mentors=(), **kwargs):
        super().__init__(*args, **kwargs)
        self.mentors = [m.to(self.args.device).eval().requires_grad_(False) for m in mentors]
        self.classroom_loss = ClassroomLoss(temperature=4.0, mentor_weight="auto", task_weight=1.0)

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        if not (model.training and self.mentors):
            return super().compute_loss(model, inputs, return_outputs, **options)
        mentor_logits = [mentor(**inputs).logits for mentor in self.mentors]
        return self.classroom_loss(model(**inputs).logits, mentor_logits, inputs["labels"])


def sentences(count):
    labels, words = torch.randint(4, (count, 1)), torch.randint(64, (count, 16))
    words = torch.where(torch.rand(count, 16) < 0.5, words - words % 4 + labels, words)
    return [{"input_ids": w, "labels": y} for w, y in zip(words, labels[:, 0], strict=True)]


def bert(size, layers, kind=hf.BertForSequenceClassification):
    sizes = {"hidden_size": size, "intermediate_size": 2 * size, "num_hidden_layers": layers}
    return kind(hf.BertConfig(vocab_size=64, num_labels=4, num_attention_heads=2, **sizes))


if __name__ == "__main__":
    parser = hf.HfArgumentParser(hf.TrainingArguments)
    parser.set_defaults(output_dir=tempfile.mkdtemp(), learning_rate=3e-3, save_strategy="no")
    parser.set_defaults(per_device_train_batch_size=16, max_steps=250)
    (settings,) = parser.parse_args_into_dataclasses()

    def fit(model, count, mentors=()):
        trainer = ClassroomTrainer(model, settings, train_dataset=data[:count], mentors=mentors)
        trainer.train()
        logits, labels, _ = trainer.predict(test)
        return f"{(logits.argmax(-1) == labels).mean():.4f}"

    hf.set_seed(settings.seed)
    data, test, mentors = sentences(1024), sentences(1024), [bert(64, 2), bert(48, 1)]
    found = [fit(m, 1024) for m in mentors] + [fit(bert(32, 1), 128, of) for of in ((), mentors)]
    print("held-out accuracy: mentors {}, {}, alone {}, in the classroom {}".format(*found))
