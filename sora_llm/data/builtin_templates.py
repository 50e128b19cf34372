"""The chat templates that come with the package, each written from its makers' published format.

They only ever append: a rendered conversation is a prefix of the same conversation rendered with one more message.
(Many published ones do not: they move the system message or the tools into the last question, or drop earlier parts.)
So a turn is the text that its message adds, and a model trained on whole conversations sees in training what it will
see when it answers turn by turn.
"""

# Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, train.py): answers end with eos, no text is trimmed.  Ours: a
# system message replaces the preamble, further turns are further sections.
_ALPACA = r"""
{%- if messages[0].role == 'system' -%}
  {{- messages[0].content -}}
{%- elif messages[0].input -%}
  {{- 'Below is an instruction that describes a task, paired with an input that provides further context. ' -}}
  {{- 'Write a response that appropriately completes the request.' -}}
{%- else -%}
  {{- 'Below is an instruction that describes a task. ' -}}
  {{- 'Write a response that appropriately completes the request.' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{- '\n\n### Instruction:\n' + (message.instruction or message.content) -}}
    {{- '\n\n### Input:\n' + message.input if message.input else '' -}}
  {%- elif message.role == 'assistant' -%}
    {{- '\n\n### Response:\n' + message.content + eos_token -}}
  {%- elif message.role != 'system' or not loop.first -%}
    {{- raise_exception('the alpaca template has no place for this ' + message.role + ' message') -}}
  {%- endif -%}
{%- endfor -%}
{{- '\n\n### Response:\n' if add_generation_prompt else '' -}}
"""

# OpenAI's ChatML (github.com/openai/openai-python/blob/release-v0.28.0/chatml.md): no text is trimmed.  Tools as
# Hermes 2 Pro has them (github.com/NousResearch/Hermes-Function-Calling), in Qwen 2.5's wording.  Ours: every tool
# response is a turn of its own (theirs share one, which a second response would have to reopen).
_CHATML = r"""
{%- set has_system = messages and messages[0].role == 'system' -%}
{%- if tools -%}
  {{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if has_system else '') -}}
  {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
  {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n' -}}
  {%- for tool in tools -%}{{- tool | tojson + '\n' -}}{%- endfor -%}
  {{- '</tools>\n\nFor each function call, return a json object with function name and arguments within ' -}}
  {{- '<tool_call></tool_call> XML tags:\n<tool_call>\n' -}}
  {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'tool' -%}
    {{- '<|im_start|>tool\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' -}}
  {%- elif not (loop.first and has_system and tools) -%}
    {{- '<|im_start|>' + message.role + '\n' + message.content -}}
    {%- for tool_call in message.tool_calls or [] -%}
      {%- set call = tool_call.function -%}
      {{- '\n' if message.content or not loop.first else '' -}}
      {{- '<tool_call>\n' + {'name': call.name, 'arguments': call.arguments} | tojson + '\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt else '' -}}
"""

# Google's Gemma 2 and 3 (ai.google.dev/gemma/docs/core/prompt-structure): all text is trimmed except the system
# message, which precedes the first question, as in Gemma 3's own template.  Nothing differs.
_GEMMA = r"""
{{- bos_token -}}
{%- for message in messages -%}
  {%- set previous = '' if loop.first else messages[loop.index0 - 1].role -%}
  {%- if message.role == 'system' and loop.first -%}
    {{- '<start_of_turn>user\n' + message.content + '\n\n' -}}
  {%- elif message.role == 'user' and previous in ('', 'system', 'assistant') -%}
    {{- ('' if previous == 'system' else '<start_of_turn>user\n') + message.content | trim + '<end_of_turn>\n' -}}
  {%- elif message.role == 'assistant' and previous == 'user' -%}
    {{- '<start_of_turn>model\n' + message.content | trim + '<end_of_turn>\n' -}}
  {%- else -%}
    {{- raise_exception('the gemma template has no place for this ' + message.role + ' message: it takes user and '
        'assistant in turn, after at most one system message') -}}
  {%- endif -%}
{%- endfor -%}
{{- '<start_of_turn>model\n' if add_generation_prompt else '' -}}
"""

# Meta's Llama 2 chat (github.com/meta-llama/llama, generation.py): all text is trimmed.  Ours: Meta writes <s> before
# every question, we only at the start, so that a sequence has exactly one.  (A chat model that expects the others
# brings its own template.)
_LLAMA_2 = r"""
{{- bos_token -}}
{%- for message in messages -%}
  {%- set previous = '' if loop.first else messages[loop.index0 - 1].role -%}
  {%- if message.role == 'system' and loop.first -%}
    {{- '[INST] <<SYS>>\n' + message.content | trim + '\n<</SYS>>\n\n' -}}
  {%- elif message.role == 'user' and previous in ('', 'system', 'assistant') -%}
    {{- ('' if previous == 'system' else '[INST] ') + message.content | trim + ' [/INST]' -}}
  {%- elif message.role == 'assistant' and previous == 'user' -%}
    {{- ' ' + message.content | trim + ' ' + eos_token -}}
  {%- else -%}
    {{- raise_exception('the llama-2 template has no place for this ' + message.role + ' message: it takes user and '
        'assistant in turn, after at most one system message') -}}
  {%- endif -%}
{%- endfor -%}
"""

# Meta's Llama 3 (llama.com/docs/model-cards-and-prompt-formats/meta-llama-3): all text is trimmed.  Tools as in
# Llama 3.1 (…/llama3_1): JSON calls, the tools themselves in the first question, results quoted.  Ours: without the
# dates that 3.1 puts into every system turn, and text alongside a call is refused; theirs drops it.
_LLAMA_3 = r"""
{%- set has_system = messages and messages[0].role == 'system' -%}
{{- bos_token -}}
{%- if tools -%}
  {{- '<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython' -}}
  {{- ('\n\n' + messages[0].content | trim if has_system else '') + '<|eot_id|>' -}}
{%- endif -%}
{%- for message in (messages[1:] if tools and has_system else messages) -%}
  {%- if tools and loop.first and message.role != 'user' -%}
    {{- raise_exception('the llama-3 template writes the tools into the first question, and this conversation begins '
        'with the ' + message.role) -}}
  {%- elif message.role == 'tool' -%}
    {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + message.content | tojson + '<|eot_id|>' -}}
  {%- else -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' -}}
    {%- if tools and loop.first -%}
      {{- 'Given the following functions, please respond with a JSON for a function call ' -}}
      {{- 'with its proper arguments that best answers the given prompt.\n\n' -}}
      {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' -}}
      {{- 'Do not use variables.\n\n' -}}
      {%- for tool in tools -%}{{- tool | tojson(indent=4) + '\n\n' -}}{%- endfor -%}
    {%- endif -%}
    {%- if message.tool_calls -%}
      {%- if message.tool_calls | length > 1 or message.content | trim -%}
        {{- raise_exception('the llama-3 template has one tool call per message, and no place for text beside it') -}}
      {%- endif -%}
      {%- set call = message.tool_calls[0].function -%}
      {{- {'name': call.name, 'parameters': call.arguments} | tojson -}}
    {%- else -%}
      {{- message.content | trim -}}
    {%- endif -%}
    {{- '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt else '' -}}
"""

# Mistral 7B Instruct v0.3 (docs.mistral.ai/guides/tokenization, the v3 tokenizer): answers are trimmed, questions are
# not.  Ours: system message and tools precede the first question (theirs the last, so that they move with every turn),
# calls may have ids of any form or none, and text alongside calls is written; theirs drops it.
_MISTRAL = r"""
{{- bos_token -}}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' if tools else '' -}}
{%- for message in messages -%}
  {%- set previous = '' if loop.first else messages[loop.index0 - 1].role -%}
  {%- if message.role == 'system' and loop.first -%}
    {{- '[INST] ' + message.content + '\n\n' -}}
  {%- elif message.role == 'user' and previous in ('', 'system', 'assistant') -%}
    {{- ('' if previous == 'system' else '[INST] ') + message.content + '[/INST]' -}}
  {%- elif message.role == 'assistant' and previous in ('user', 'tool') -%}
    {{- ' ' + message.content | trim if message.content | trim or not message.tool_calls else '' -}}
    {%- for tool_call in message.tool_calls or [] -%}
      {%- set call = dict(name=tool_call.function.name, arguments=tool_call.function.arguments) -%}
      {{- '[TOOL_CALLS] [' if loop.first else ', ' -}}
      {{- (dict(call, id=tool_call.id) if tool_call.id else call) | tojson + (']' if loop.last else '') -}}
    {%- endfor -%}
    {{- eos_token -}}
  {%- elif message.role == 'tool' and previous in ('assistant', 'tool') -%}
    {#- a result that is an object or a list is JSON already -#}
    {{- '[TOOL_RESULTS] {"content": ' -}}
    {{- message.content if message.content[:1] in ('{', '[') else message.content | tojson -}}
    {{- ', "call_id": ' + message.tool_call_id | tojson if message.tool_call_id else '' -}}
    {{- '}[/TOOL_RESULTS]' -}}
  {%- else -%}
    {{- raise_exception('the mistral template has no place for this ' + message.role + ' message: it takes user and '
        'assistant in turn, after at most one system message and with tool results after the calls') -}}
  {%- endif -%}
{%- endfor -%}
"""

# Vicuna v1.1 (github.com/lm-sys/FastChat, conversation.py): no text is trimmed.  Nothing differs.
_VICUNA = r"""
{%- set default = 'A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
{%- set has_system = messages and messages[0].role == 'system' -%}
{{- messages[0].content if has_system else default -}}
{%- for message in (messages[1:] if has_system else messages) -%}
  {%- if message.role == 'user' and loop.index0 is even -%}
    {{- (' USER: ' if loop.first else 'USER: ') + message.content -}}
  {%- elif message.role == 'assistant' and loop.index0 is odd -%}
    {{- ' ASSISTANT: ' + message.content + eos_token -}}
  {%- else -%}
    {{- raise_exception('the vicuna template has no place for this ' + message.role + ' message: it takes user and '
        'assistant in turn, after at most one system message') -}}
  {%- endif -%}
{%- endfor -%}
{{- ' ASSISTANT:' if add_generation_prompt else '' -}}
"""

TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "gemma": _GEMMA,
    "llama-2": _LLAMA_2,
    "llama-3": _LLAMA_3,
    "mistral": _MISTRAL,
    "vicuna": _VICUNA,
}
"""The built-in chat templates, Jinja sources by name.  Of these, chatml, llama-3 and mistral accept tools."""

DEFAULT_TEMPLATE = "alpaca"
"""For tokenizers without a template, as base models have: plain text, and answers that end with eos."""
