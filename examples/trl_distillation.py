"""A classroom in TRL's GKD trainer, where half of the batches are text that the student wrote.

    pip install -c constraints.txt -e ".[examples]"
    python examples/trl_distillation.py

Text and networks are those of language_model.py. Only the mentors teach, as in GKD: with
``task_weight=0`` the student does not learn to repeat itself.
"""

import language_model as lm
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from trl.experimental.gkd import GKDConfig, GKDTrainer

from classroomkd import fused_linear_classroom_loss


class ClassroomTrainer(GKDTrainer):
    loss_is_scaled_for_ga = False  # a mean over the batch, which gradient accumulation divides

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        heads = [(n.model(**tokens)[0][:, :-1], n.lm_head.weight) for n in (model, *self.mentors)]
        labels, options = inputs["labels"][:, 1:], lm.OPTIONS | {"task_weight": 0.0}
        loss = fused_linear_classroom_loss(*heads[0], heads[1:], labels, **options)
        return (loss, {}) if return_outputs else loss


def collate(samples):
    tokens = torch.tensor([sample["tokens"] for sample in samples])
    labels = tokens.index_fill(1, torch.arange(lm.PROMPT), -100)  # TRL does not shift them
    prompts, everywhere = tokens[:, : lm.PROMPT], torch.ones_like(tokens)
    texts = {"input_ids": tokens, "attention_mask": everywhere, "labels": labels}
    return texts | {"prompts": prompts, "prompt_attention_mask": everywhere[:, : lm.PROMPT]}


def main(steps, seed, folder):
    symbols, pages, held_out = lm.texts()
    words = models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token=" ")
    tokenizer = lm.hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token=" ")
    lm.hf.set_seed(seed)
    teacher, peer, student = lm.llama(96, 2), lm.llama(64, 1), lm.llama(32, 1)
    student.generation_config.eos_token_id = None
    shared = lm.settings(steps, seed, folder)
    for mentor in (teacher, peer):
        lm.fit(mentor, pages, held_out, shared)
    config = GKDConfig(**shared, lmbda=0.5, max_new_tokens=lm.LENGTH - lm.PROMPT, bf16=False)
    data = Dataset.from_dict({"tokens": pages.tolist()})
    trainer = ClassroomTrainer(student, teacher, config, collate, data, processing_class=tokenizer)
    mentors = (teacher, peer, lm.shuffled(teacher))
    trainer.mentors = [mentor.eval().requires_grad_(False) for mentor in mentors]
    trainer.train()
    networks = {"teacher": teacher, "peer": peer, "student": student.eval()}
    print(*lm.check(networks, held_out, symbols), sep="\n")


if __name__ == "__main__":
    lm.run(main)
