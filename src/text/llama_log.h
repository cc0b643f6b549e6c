// Keeps libllama, ggml and llama.cpp's common library from printing, and keeps what they complain of, so that
// a Status can quote it. Also turns their assertions about a file's content into errors: a library must not
// abort.
#pragma once

#include <string>

namespace narrows {

/// Installs the handlers, once for the process. Everything below "error" is dropped. Any function that calls
/// into libllama or ggml for the first time calls this first.
void silence_llama_log();

/// Forgets this thread's error text.
void clear_llama_error();

/// The first error that libllama or ggml reported on this thread since clear_llama_error(): the first one is
/// the cause, the later ones say that loading failed. One quoted line without the name of their function; "no
/// reason given" if there is none.
std::string llama_error();

/// While one lives, a failed GGML_ASSERT on this thread throws std::runtime_error instead of aborting the
/// process. For reading vocabularies and templates, where libllama asserts what an untrusted file says. The
/// exception passes through ggml_abort(), a C function: GCC and Clang write the unwind tables that this needs
/// for C too on x86-64 and AArch64 Linux; text/tokenizer_test.cpp proves it with a vocabulary that has a word
/// twice.
class LlamaAbortGuard {
 public:
  LlamaAbortGuard();
  ~LlamaAbortGuard();
  LlamaAbortGuard(const LlamaAbortGuard&) = delete;
  LlamaAbortGuard& operator=(const LlamaAbortGuard&) = delete;
};

}  // namespace narrows
