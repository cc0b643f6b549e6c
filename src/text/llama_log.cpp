// Log and abort callbacks. The error text is kept per thread: two threads that load files at once must not
// read each other's reasons.
#include "text/llama_log.h"

#include <ggml.h>
#include <llama.h>
#include <log.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <mutex>
#include <stdexcept>
#include <string_view>

#include "base/utf8.h"

namespace narrows {
namespace {

thread_local std::string t_first_error;
thread_local int t_guards = 0;

/// "llama_model_load: error loading model: x\n" -> "error loading model: x"
std::string_view without_function_name(std::string_view text) {
  const size_t colon = text.find(": ");
  if (colon == std::string_view::npos) return text;
  const bool is_name = std::all_of(text.begin(), text.begin() + colon,
                                   [](unsigned char c) { return std::isalnum(c) != 0 || c == '_'; });
  return is_name && text.substr(0, colon).find('_') != std::string_view::npos ? text.substr(colon + 2) : text;
}

void keep_errors(ggml_log_level level, const char* text, void* /*user_data*/) {
  if (level != GGML_LOG_LEVEL_ERROR || !t_first_error.empty()) return;
  std::string_view line = without_function_name(text);
  while (!line.empty() &&
         (std::isspace(static_cast<unsigned char>(line.back())) != 0 || line.back() == '.')) {
    line.remove_suffix(1);
  }
  try {
    t_first_error = line;
  } catch (...) {  // called from C: without memory there is no reason given
  }
}

void on_abort(const char* message) {
  if (t_guards > 0) {
    // "/build/path/llama-vocab.cpp:12: GGML_ASSERT(x) failed": the folder is of no use to the reader.
    std::string_view text = message;
    const size_t slash = text.substr(0, text.find(".cpp:")).rfind('/');
    if (slash != std::string_view::npos) text.remove_prefix(slash + 1);
    throw std::runtime_error(std::string(text));
  }
  // ggml calls abort() when this returns: the last chance to say why.
  (void)std::fprintf(stderr, "%s\n", message);
}

}  // namespace

void silence_llama_log() {
  static std::once_flag once;
  std::call_once(once, [] {
    llama_log_set(keep_errors, nullptr);
    common_log_set_verbosity_thold(-1);  // below LOG_LEVEL_OUTPUT: nothing at all
    ggml_set_abort_callback(on_abort);
  });
}

void clear_llama_error() { t_first_error.clear(); }

std::string llama_error() { return t_first_error.empty() ? "no reason given" : quote(t_first_error, 300); }

LlamaAbortGuard::LlamaAbortGuard() {
  silence_llama_log();
  ++t_guards;
}

LlamaAbortGuard::~LlamaAbortGuard() { --t_guards; }

}  // namespace narrows
