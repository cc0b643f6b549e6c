// The flags that several commands share: which model, how its cache is kept, how tokens are drawn.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "narrows/engine.h"
#include "narrows/sampling.h"

namespace narrows::cli {

struct ModelFlags {
  std::string path;
  std::optional<int64_t> memory_mb;
  std::string device = "cpu";
  RopeOverrides rope;
  std::string template_source;
  std::string template_file;
  std::string template_arguments;

  /// -m and the flags of RoPE.
  void add_to(CLI::App& app);
  /// --device, for commands that compute.
  void add_device_to(CLI::App& app);
  /// Those of the chat template, for commands that chat.
  void add_template_to(CLI::App& app);
  /// Limits the process's memory too. What the model warns of goes to standard error, or to `warn`.
  Result<std::shared_ptr<const Model>> load(LoadOptions options = {},
                                            const std::function<void(const std::string&)>& warn = {}) const;

 private:
  Result<ChatTemplateOptions> chat_template() const;
};

struct SessionFlags {
  std::string kv = kDefaultProfile;
  std::string basis;
  std::optional<int64_t> n_ctx;
  std::optional<int> threads;
  PromptOptions prompt;

  void add_to(CLI::App& app);
  /// invalid_argument if the profile is not one.
  Result<SessionOptions> parse() const;
};

struct SamplerFlags {
  SamplerOptions options;
  std::optional<uint32_t> seed;
  bool greedy = false;

  void add_to(CLI::App& app);
  /// With the seed that is used: the given one, or a random one.
  SamplerOptions resolve() const;
};

/// For CLI11's check(): whole decimal numbers only (CLI11 itself would read 010 as 8), and the range in the
/// error.
CLI::Validator whole_number(int64_t low, int64_t high);

/// For CLI11's check(): a cache of llama.cpp's, LlamaPeer::check_kv().
CLI::Validator peer_cache();

void add_threads_option(CLI::App& app, std::optional<int>& threads);
/// --products, --attention and --prefill.
void add_prompt_options(CLI::App& app, PromptOptions& options);

/// What --kv means and takes, for help texts.
std::string profile_help();

/// The text of a file, without a byte order mark. invalid_file names the file, and the offset of the first
/// byte that is not UTF-8.
Result<std::string> read_text_file(const std::string& path);

/// Parts separated by one blank line, empty ones left out.
std::string join_parts(const std::vector<std::string>& parts);

}  // namespace narrows::cli
