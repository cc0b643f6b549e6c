// Cuts text into words before byte-pair merging, in place of libllama's unicode_regex_split(): that one gives
// some vocabularies' expressions to std::regex, whose recursion overflows the stack at some 27,000 like
// characters and whose time can grow with the square of their number. The linker puts ours in its place
// (--wrap, src/text/CMakeLists.txt), so that libllama's own tokenizer calls it.
#pragma once

#include <string>
#include <vector>

namespace narrows {

/// The words of `text` (UTF-8) by one expression after the other, each within the words of the ones before;
/// with byte_encode in GPT-2's characters for bytes. The same words as libllama's. Throws as it does:
/// std::bad_alloc, std::runtime_error.
std::vector<std::string> split_words(const std::string& text, const std::vector<std::string>& expressions,
                                     bool byte_encode);

/// libllama's own, for comparing: do not give it long runs of like characters.
std::vector<std::string> library_split_words(const std::string& text,
                                             const std::vector<std::string>& expressions, bool byte_encode);

/// For tests: from now on called with the expressions of every text that libllama has cut; null: no more.
void watch_expressions(void (*watcher)(const std::vector<std::string>& expressions));

}  // namespace narrows
