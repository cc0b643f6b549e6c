// A chat template that knows tools and one that thinks, for tests that need no model.
#pragma once

#include "text/tiny_vocabulary.h"

namespace narrows::testing {

inline constexpr const char* kToolTemplate =
    "{% if tools %}<|im_start|>system\n# Tools\n<tools>\n"
    "{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}</tools>\n"
    "Call them as <tool_call>\n{\"name\": <name>, \"arguments\": <arguments>}\n</tool_call><|im_end|>\n{% "
    "endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' and m.tool_calls %}<|im_start|>assistant"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for call in m.tool_calls %}{{ '\n' }}<tool_call>\n{\"name\": \"{{ call.function.name }}\", \"arguments\": "
    "{{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content "
    "}}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

inline constexpr const char* kThinkingTemplate =
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.reasoning_content %}<think>\n{{ m.reasoning_content "
    "}}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% "
    "endif %}";

inline TinyVocabulary tool_vocabulary(const char* chat_template = kToolTemplate) {
  TinyVocabulary vocabulary;
  vocabulary.chat_template = chat_template;
  vocabulary.more = {
      {"<|im_start|>", 3}, {"<tool_call>", 3}, {"</tool_call>", 3}, {"<think>", 3}, {"</think>", 3}};
  return vocabulary;
}

}  // namespace narrows::testing
