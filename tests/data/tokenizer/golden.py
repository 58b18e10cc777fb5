#!/usr/bin/env python3
"""Writes golden.json: what vLLM makes of the conversations in cases.json.

    python3 golden.py        (with vllm 0.32.0 and transformers 5.19.0 installed)

The conversations go through vLLM's own code: request validation, parse_chat_messages, detection of
the content format, and transformers' apply_chat_template. Only the clock is fixed, to 2026-11-22
16:12:58. An error is written as null.
"""

import copy
import datetime
import json
import pathlib
import sys
import types

import transformers.utils.chat_template_utils as template_utils
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers import chat_utils, hf
from vllm.renderers.params import merge_kwargs

HERE = pathlib.Path(__file__).resolve().parent
MODEL = types.SimpleNamespace(
    multimodal_config=None, enable_prompt_embeds=False, is_multimodal_model=False
)


class FixedClock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 11, 22, 16, 12, 58)


template_utils.datetime = FixedClock
hf.resolve_chat_template = lambda tokenizer, chat_template, tools, model_config: (
    chat_template or tokenizer.get_chat_template(None, tools=tools)
)


def render(tokenizer, body):
    request = ChatCompletionRequest.model_validate({"model": "m", **copy.deepcopy(body)})
    tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
    params = request.build_chat_params(None, "auto").with_defaults({"tools": tools, "tokenize": False})
    template = tokenizer.get_chat_template(None, tools=tools)
    content_format = hf._detect_content_format(template, default="string")
    conversation, _, _ = chat_utils.parse_chat_messages(request.messages, MODEL, content_format)
    kwargs = params.get_apply_chat_template_kwargs()
    kwargs.pop("chat_template", None)
    kwargs.pop("tokenize", None)
    text = hf.safe_apply_chat_template(MODEL, tokenizer, conversation, tokenize=False, **kwargs)
    return content_format, text


def main():
    tokenizer_file = HERE.parents[2] / "crates" / "tokens" / "assets" / "demo" / "tokenizer.json"
    groups = json.loads((HERE / "cases.json").read_text())
    for group in groups:
        source = (HERE / "templates" / group["template"]).read_text()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer_file), bos_token="<|endoftext|>", eos_token="<|im_end|>"
        )
        tokenizer.chat_template = source
        for case in group["cases"]:
            try:
                case["format"], case["expected"] = render(tokenizer, case["body"])
            except Exception as error:
                print(f"{case['name']}: {type(error).__name__}: {error}", file=sys.stderr)
                case["format"], case["expected"] = None, None
    (HERE / "golden.json").write_text(json.dumps(groups, indent=1) + "\n")


if __name__ == "__main__":
    main()
