"""A byte-level BPE tokenizer trained on the shapes questions, and the LLaVA processor.

Being byte-level it encodes any text; being trained on the world's own sentences it gives each of
their words one token. Training is deterministic, so the files shipped with the teacher can be
made again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastalign.evals.shapes.questions import NOTHING, NUMBERS, RELATIONS
from fastalign.evals.shapes.world import COLOURS, COLUMNS, IMAGE_SIZE, ROWS, SHAPES

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
SPECIAL = (PAD, BOS, EOS, IMAGE)
PATCH = 8
"""Pixels per side of a patch: 36 visual tokens for a 48 x 48 image."""


def corpus() -> list[str]:
    """Sentences that hold every word of the world, each several times."""
    words = [*COLOURS, *SHAPES, *ROWS, *COLUMNS, *NUMBERS, NOTHING, *RELATIONS.values()]
    words += ["yes", "no", "things", "shapes", "the", "thing"]
    frames = (
        "is there a {}?",
        "what is just {} the {}?",
        "how many {} things?",
        "where is the {}?",
        "what is at {}?",
        "{}",
    )
    return [frame.format(word, word) for frame in frames for word in words for _ in range(4)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; ids 0..3 are <pad>, <s>, </s>, <image>. Texts get a leading <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,  # an upper bound: training stops when every word is one token
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """``processor(images=image, text="<image>where is the red circle?", return_tensors="pt")``."""
    from transformers import LlavaProcessor, SiglipImageProcessorPil

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = SiglipImageProcessorPil(
        size=size, do_resize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE,
    )
