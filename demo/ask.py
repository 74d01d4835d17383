"""Asks the demo model through transformers, without any cluster; for evaluation and tests."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pdserve.demo.corpus import Conversation


class Asker:
    """The demo model in this process, answering greedily."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    @torch.inference_mode()
    def ask(self, conversations: list[Conversation], longest: int = 256) -> list[str]:
        """An answer to each conversation, of at most ``longest`` tokens, worked out together."""
        texts = [
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in conversations
        ]
        batch = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        out = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=longest,
            do_sample=False,
        )
        new = out[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
