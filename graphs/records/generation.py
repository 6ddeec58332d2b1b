"""How a checkpoint wants text to be generated: the settings of its generation_config.json that change tokens."""

from pydantic import Field

from graphs.records.record import Record

TokenIds = tuple[int, ...]


class GenerationSettings(Record):
    """Settings of transformers' `generate` under their names there; the defaults change nothing.

    They act on the logits of each new token (btp_export/running/logit_rules.py). `forced_bos_token_id` is left out,
    because behind a prompt of more than one token it does nothing. `not_followed` names settings of the file that would
    change tokens and that this project does not follow, as "name=value".
    """

    repetition_penalty: float = Field(default=1.0, gt=0)
    encoder_repetition_penalty: float = Field(default=1.0, gt=0)
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    encoder_no_repeat_ngram_size: int = Field(default=0, ge=0)
    bad_words_ids: tuple[TokenIds, ...] = ()
    min_length: int = Field(default=0, ge=0)  # prompt and image tokens counted
    min_new_tokens: int = Field(default=0, ge=0)
    forced_eos_token_id: TokenIds = ()
    suppress_tokens: TokenIds = ()
    begin_suppress_tokens: TokenIds = ()
    not_followed: tuple[str, ...] = ()

    @property
    def change_logits(self) -> bool:
        """Whether any of them acts on logits."""
        return self.model_copy(update={"not_followed": ()}) != GenerationSettings()
