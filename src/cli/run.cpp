// `narrows run`: one answer to files and a question, or a chat about the files.
#include <fmt/format.h>

#include <memory>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/utf8.h"
#include "cli/chat.h"
#include "cli/commands.h"
#include "cli/engine_flags.h"
#include "cli/generate.h"
#include "cli/interrupt.h"
#include "cli/output.h"
#include "cli/report.h"
#include "cli/saved_session.h"

namespace narrows::cli {
namespace {

constexpr int64_t kMaxTokens = 1'000'000'000;

constexpr const char* kFooter =
    R"(The prompt is the files' contents, then the text of -p, as one message through the model's chat template. Without -p
the program chats: questions come from the terminal or, one a line, from a pipe. The answer goes to standard output,
everything else to standard error. Ctrl-C stops an answer. SIGTERM and SIGHUP end the program with exit code 1, after the
running step. With --session the file is written when the prompt is read, and once more at the end: after an answer, a signal
or a closed pipe. A prompt stopped in the middle leaves the part that was read, in steps of some thousand tokens.

Examples:
  narrows run -m model.gguf -f report.txt -p "What are the three main findings?" --kv klt-10x
  narrows run -m model.gguf -f report.txt                     chat about the file
  narrows run -m model.gguf -f report.txt -p "And who wrote it?" --session report.session      the file is read once
  git diff | narrows run -m model.gguf -f /dev/stdin -p "Explain this change."
  narrows run -m model.gguf --raw -p "Once upon a time" -n 100 --seed 7 --json)";

struct RunFlags {
  ModelFlags model;
  SessionFlags session;
  SamplerFlags sampler;
  std::vector<std::string> files;
  std::optional<std::string> prompt;
  std::optional<int64_t> max_tokens;
  std::string system;
  std::string session_file;
  bool raw = false;
  bool json = false;

  bool chats() const { return !prompt && !(raw && !files.empty()); }
};

/// Everything that can be wrong without loading the model.
Status check(const RunFlags& flags) {
  if (flags.json && flags.chats()) {
    return {StatusCode::invalid_argument, "--json needs a prompt: give one with -p TEXT"};
  }
  if (flags.raw && flags.chats()) {
    return {StatusCode::invalid_argument, "--raw needs a prompt: give one with -p TEXT or -f FILE"};
  }
  if (flags.raw && !flags.system.empty()) {
    return {StatusCode::invalid_argument, "--system has no place in a --raw prompt: leave one of them out"};
  }
  if (!flags.session_file.empty() && flags.chats()) {
    return {StatusCode::invalid_argument, "--session needs a prompt: give one with -p TEXT"};
  }
  for (const auto& [name, text] :
       {std::pair{"-p", flags.prompt.value_or("")}, std::pair{"--system", flags.system}}) {
    if (const size_t bad = find_invalid_utf8(text); bad != std::string::npos) {
      return {StatusCode::invalid_argument,
              fmt::format("the text of {} is not valid UTF-8 at byte {}", name, bad)};
    }
  }
  return {};
}

Result<std::string> read_documents(const std::vector<std::string>& files) {
  std::vector<std::string> parts;
  for (const std::string& file : files) {
    Result<std::string> text = read_text_file(file);
    if (!text.ok()) return text;
    parts.push_back(std::move(text).value());
  }
  return join_parts(parts);
}

Result<std::vector<Token>> prompt_tokens(const Tokenizer& tokenizer, const RunFlags& flags,
                                         const std::string& text) {
  if (flags.raw) return tokenizer.encode(text, true, true);
  std::vector<ChatMessage> messages;
  if (!flags.system.empty()) messages.push_back({"system", flags.system});
  messages.push_back({"user", text});
  const Result<ChatPrompt> rendered = tokenizer.apply_chat_template(messages, true);
  if (!rendered.ok()) return rendered.status();
  return tokenizer.encode(*rendered);
}

/// The session of --session, or a new one.
Result<ResumedSession> open_session(const RunFlags& flags, const std::shared_ptr<const Model>& model,
                                    const SessionOptions& options, std::span<const Token> prompt) {
  if (!flags.session_file.empty()) return resume_session(model, options, flags.session_file, prompt);
  Result<std::unique_ptr<Session>> made = Session::create(model, options);
  if (!made.ok()) return made.status();
  return ResumedSession{std::move(*made), 0};
}

Outcome answer_once(const RunFlags& flags, const std::shared_ptr<const Model>& model,
                    const SessionOptions& session_options, Sampler& sampler, const std::string& text,
                    uint32_t seed) {
  Result<std::vector<Token>> tokens = prompt_tokens(model->tokenizer(), flags, text);
  if (!tokens.ok()) return tokens.status();
  if (tokens->empty())
    return Status(StatusCode::invalid_argument, "the prompt has no tokens: give some text");
  const Result<ResumedSession> resumed = open_session(flags, model, session_options, *tokens);
  if (!resumed.ok()) return resumed.status();
  Session& session = *resumed->session;

  SessionKeeper keeper(session, flags.session_file, *tokens, resumed->n_cached);
  GenerateOptions options;
  options.n_cached = resumed->n_cached;
  options.max_tokens = flags.max_tokens;
  options.show = [&](std::string_view part) { return flags.json ? Status() : write_stdout(part); };
  options.prompt_read = [&] { keeper.prompt_is_read(); };
  Answer answer;
  catch_end_signals();
  Outcome outcome = generate(session, sampler, *tokens, options, answer);
  if (outcome.status.ok()) {
    RunReport report = make_report(session, answer, seed);
    report.saved = !flags.session_file.empty();
    outcome = {write_stdout(flags.json ? json_document(report) : "\n"), Phase::at_work};
    if (outcome.status.ok()) note(summary(report));
  }
  Status saved = keeper.finish(answer);
  if (!outcome.status.ok()) return outcome;
  if (!saved.ok()) return {std::move(saved), Phase::at_work};
  if (answer.stop == StopReason::told_to_end)
    return {Status(StatusCode::cancelled, "ended by a signal: the answer is cut off"), Phase::at_work};
  return {};
}

Outcome run(const RunFlags& flags) {
  if (Status status = check(flags); !status.ok()) return status;
  const SamplerOptions sampling = flags.sampler.resolve();
  Result<SessionOptions> session_options = flags.session.parse();
  if (!session_options.ok()) return session_options.status();
  if (!flags.session_file.empty()) {
    if (Status s = check_writable(flags.session_file); !s.ok()) return s;
    session_options->segments = true;
  }
  const Result<std::unique_ptr<Sampler>> sampler = Sampler::create(sampling);
  if (!sampler.ok()) return sampler.status();
  Result<std::string> documents = read_documents(flags.files);
  if (!documents.ok()) return documents.status();
  const std::string text = join_parts({*documents, flags.prompt.value_or("")});
  if (!flags.chats() && text.empty()) {
    return Status(StatusCode::invalid_argument,
                  "the prompt is empty: give some text with -p TEXT or -f FILE");
  }

  Result<std::shared_ptr<const Model>> model = flags.model.load();
  if (!model.ok()) return model.status();
  if (flags.chats()) {
    const Result<std::unique_ptr<Session>> session = Session::create(*model, *session_options);
    if (!session.ok()) return session.status();
    catch_end_signals();
    return Chat(**session, **sampler, {flags.system, std::move(*documents), flags.max_tokens, sampling})
        .run();
  }
  return answer_once(flags, *model, *session_options, **sampler, text, sampling.seed);
}

}  // namespace

Command make_run_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("run", "Answer a question about long texts, or chat about them");
  auto flags = std::make_shared<RunFlags>();
  flags->model.add_to(*command);
  flags->model.add_device_to(*command);
  flags->model.add_template_to(*command);
  command->add_option("-f,--file", flags->files, "text file to put before the question; may be given again")
      ->type_name("FILE")
      ->allow_extra_args(false);
  command->add_option("-p,--prompt", flags->prompt, "the question; without it the program chats")
      ->type_name("TEXT");
  command->add_option("--system", flags->system, "system message (default: the chat template's own)")
      ->type_name("TEXT");
  command
      ->add_option("-n,--tokens-to-generate", flags->max_tokens,
                   "most tokens an answer may have (default: until the model ends it or the context is full)")
      ->type_name("TOKENS")
      ->check(whole_number(0, kMaxTokens));
  flags->session.add_to(*command);
  command
      ->add_option("--session", flags->session_file,
                   "file that keeps the cache: what the prompt has in common with it is not read again, and "
                   "the cache replaces it when the prompt is read and after the answer")
      ->type_name("FILE");
  flags->sampler.add_to(*command);
  command->add_flag(
      "--raw", flags->raw,
      "continue the bare text, without the chat template; special tokens written out in it count");
  command->add_flag("--json", flags->json,
                    "print one JSON document on standard output, and nothing else there");
  command->footer(kFooter);
  return {command, [flags] { return run(*flags); }};
}

}  // namespace narrows::cli
