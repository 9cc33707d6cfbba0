"""The two figures of the table: bits per byte, and completions that tokenize."""

import random
import tokenize
from collections.abc import Sequence
from io import StringIO
from token import EXACT_TOKEN_TYPES

import torch
from stdlib_corpus import Source
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from affine_tensor import evaluate

PROMPT_LINES = (8, 40)
CLOSES = {")": "(", "]": "[", "}": "{"}


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    batch_size: int = 8,
) -> float:
    """Bits that the model needs for the files, over their bytes in UTF-8.

    Each file is coded on its own, from a document start on, in windows of the model's
    context that move by three quarters of it. Every token is counted once, the first
    included; from the second window on, each has a quarter of a context before it, or
    more.
    """
    texts = [source.text for source in sources]
    return evaluate.bits_per_byte(
        model,
        tokenizer,
        texts,
        context=model.config.max_position_embeddings,
        batch_size=batch_size,
    )


def tokenizes(text: str) -> bool:
    """Whether Python's tokenizer takes `text` without an error up to its last line.

    The last line, which may be unfinished, is left out. What then counts as an error
    is all that `tokenize.generate_tokens` raises (an unterminated string in one line,
    a dedent that fits no level, ...), a token that is none of Python's (an ERRORTOKEN
    before Python 3.12, an unknown OP or NAME since), and a bracket that closes nothing
    or another kind of bracket (which Python before 3.12 lets pass). What does not
    count: that the text ends inside a bracket, a statement or a triple-quoted string.
    """
    whole_lines = text[: text.rfind("\n") + 1]
    stack: list[str] = []
    try:
        for token in tokenize.generate_tokens(StringIO(whole_lines).readline):
            if not _is_known(token):
                return False
            if token.type != tokenize.OP:
                continue
            if token.string in CLOSES.values():
                stack.append(token.string)
            elif token.string in CLOSES and (
                not stack or stack.pop() != CLOSES[token.string]
            ):
                return False
    except tokenize.TokenError as error:
        # "EOF in multi-line string" and "... statement" up to 3.11; since 3.12
        # "unterminated triple-quoted string literal", "unexpected EOF in multi-line ..."
        message = str(error.args[0])
        return "EOF in multi-line" in message or "unterminated triple" in message
    except SyntaxError:  # IndentationError among them
        return False
    return True


def _is_known(token: tokenize.TokenInfo) -> bool:
    if token.type == tokenize.OP:
        return token.string in EXACT_TOKEN_TYPES
    if token.type == tokenize.NAME:
        return token.string.isidentifier()
    return token.type != tokenize.ERRORTOKEN


def prompts(sources: Sequence[Source], count: int, seed: int) -> list[str]:
    """`count` beginnings of code, drawn from the files with `seed`, short ones first.

    Each begins where a file, or a `def`, `class` or decorator at its left edge begins,
    ends with a line 8 to 40 lines on, wherever that is (a docstring, an argument list),
    and tokenizes itself.
    """
    generator = random.Random(seed)
    places: list[tuple[list[str], int]] = []
    for source in sources:
        lines = StringIO(source.text).readlines()
        for number, line in enumerate(lines[: -PROMPT_LINES[0]]):
            if number == 0 or line.startswith(("def ", "class ", "@", "async def ")):
                places.append((lines, number))
    found: list[str] = []
    while len(found) < count:
        lines, first = generator.choice(places)
        prompt = "".join(lines[first : first + generator.randint(*PROMPT_LINES)])
        if tokenizes(prompt) and prompt not in found:
            found.append(prompt)
    return sorted(found, key=len)  # like lengths share a batch


@torch.inference_mode()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    beginnings: Sequence[str],
    *,
    tokens: int = 200,
    temperature: float = 0.7,
    seed: int = 0,
    batch_size: int = 16,
) -> list[str]:
    """Each beginning followed by `tokens` sampled tokens, no more and no fewer."""
    torch.manual_seed(seed)
    texts: list[str] = []
    for start in range(0, len(beginnings), batch_size):
        batch = list(beginnings[start : start + batch_size])
        encoded = tokenizer(
            batch, return_tensors="pt", padding=True, padding_side="left"
        )
        output = model.generate(
            input_ids=encoded["input_ids"].to(model.device),
            attention_mask=encoded["attention_mask"].to(model.device),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id,
        )
        completions = output[:, encoded["input_ids"].shape[1] :]
        texts += [
            beginning + tokenizer.decode(ids)
            for beginning, ids in zip(batch, completions, strict=True)
        ]
    return texts
