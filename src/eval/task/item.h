// One question of a task, and what the model reads of it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "narrows/text.h"

namespace narrows {

/// Which question it is: the same numbers give the same question.
struct ItemId {
  std::string task;     ///< "niah_single_1", "file"
  int64_t context = 0;  ///< tokens of prompt and answer that it was made for; 0: as long as it is
  int64_t index = 0;    ///< from 0; of a file the line, from 1

  auto operator<=>(const ItemId&) const = default;
};

struct TaskItem {
  ItemId id;
  std::vector<ChatMessage> messages;
  std::string lead_in;  ///< how the answer begins: given to the model, not judged
  std::vector<std::string> expected;
  int64_t max_tokens = 0;  ///< of the answer
};

/// The questions of a run, made when their turn comes: texts of many thousand tokens need not lie in memory
/// together.
struct TaskItems {
  std::vector<ItemId> ids;
  std::function<Result<TaskItem>(const ItemId&)> make;
};

/// The messages in the model's chat template, control tokens read only where the template wrote them, and the
/// beginning of the answer. raw, or a model without a template: the messages' texts one after another, a
/// blank line behind each of the assistant's.
Result<std::vector<Token>> item_prompt(const Tokenizer& tokenizer, const TaskItem& item, bool raw);

}  // namespace narrows
