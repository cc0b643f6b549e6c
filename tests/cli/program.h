// Runs the built program without a shell and keeps what it said: exit code, stdout, stderr.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "temp_dir.h"

namespace narrows::testing {

struct Finished {
  int exit_code = -1;  ///< minus the signal's number if one ended the program
  std::string out;
  std::string err;
};

struct ProgramOptions {
  std::string input = {};           ///< standard input
  std::string out_path = {};        ///< standard output; empty: kept
  bool out_is_closed_pipe = false;  ///< standard output is a pipe that nobody reads
  int closed_stream = -1;           ///< 0, 1 or 2: the program starts without it
};

/// A running program; its streams are files, so that no pipe can fill up.
class Program {
 public:
  explicit Program(const std::vector<std::string>& arguments, const ProgramOptions& options = {})
      : out_path_(options.out_path.empty() ? dir_.path("out") : options.out_path) {
    dir_.file("in", options.input);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, dir_.path("in").c_str(), O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 2, dir_.path("err").c_str(), O_WRONLY | O_CREAT | O_TRUNC,
                                     0600);
    int pipe_ends[2] = {-1, -1};
    if (options.out_is_closed_pipe) {
      EXPECT_EQ(::pipe2(pipe_ends, O_CLOEXEC), 0);
      posix_spawn_file_actions_adddup2(&actions, pipe_ends[1], 1);
      ::close(pipe_ends[0]);
    } else {
      posix_spawn_file_actions_addopen(&actions, 1, out_path_.c_str(), O_WRONLY | O_CREAT, 0600);
    }
    if (options.closed_stream >= 0) posix_spawn_file_actions_addclose(&actions, options.closed_stream);
    std::vector<std::string> all = {NARROWS_PROGRAM};
    all.insert(all.end(), arguments.begin(), arguments.end());
    std::vector<char*> pointers;
    for (std::string& argument : all) pointers.push_back(argument.data());
    pointers.push_back(nullptr);
    EXPECT_EQ(::posix_spawn(&pid_, NARROWS_PROGRAM, &actions, nullptr, pointers.data(), environ), 0)
        << NARROWS_PROGRAM;
    posix_spawn_file_actions_destroy(&actions);
    if (pipe_ends[1] >= 0) ::close(pipe_ends[1]);
  }
  ~Program() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  /// Until n bytes have come out or the time is over.
  bool wait_for_output(size_t n, std::chrono::seconds limit = std::chrono::seconds(60)) const {
    const auto end = std::chrono::steady_clock::now() + limit;
    while (std::chrono::steady_clock::now() < end) {
      if (content(out_path_).size() >= n) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return false;
  }

  void interrupt() const { send(SIGINT); }
  void send(int signal_number) const { ::kill(pid_, signal_number); }

  /// Until the text stands on standard error or the time is over.
  bool wait_for_note(const std::string& text, std::chrono::seconds limit = std::chrono::seconds(120)) const {
    const auto end = std::chrono::steady_clock::now() + limit;
    while (std::chrono::steady_clock::now() < end) {
      if (content(dir_.path("err")).find(text) != std::string::npos) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return false;
  }

  Finished wait() {
    int status = 0;
    EXPECT_EQ(::waitpid(pid_, &status, 0), pid_);
    pid_ = -1;
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), content(out_path_),
            content(dir_.path("err"))};
  }

 private:
  static std::string content(const std::string& path) {
    if (!std::filesystem::is_regular_file(path)) return "";  // a device
    std::ifstream file(path, std::ios::binary);
    std::stringstream all;
    all << file.rdbuf();
    return all.str();
  }

  TempDir dir_;
  std::string out_path_;
  pid_t pid_ = -1;
};

inline Finished run(const std::vector<std::string>& arguments, const ProgramOptions& options = {}) {
  return Program(arguments, options).wait();
}

/// A refusal: this exit code, nothing on stdout, one line "narrows: ..." on stderr with all these words.
inline void expect_refusal(const Finished& finished, int exit_code, const std::vector<std::string>& words) {
  EXPECT_EQ(finished.exit_code, exit_code) << finished.err;
  EXPECT_EQ(finished.out, "");
  EXPECT_EQ(finished.err.rfind("narrows: ", 0), 0U) << finished.err;
  EXPECT_EQ(std::count(finished.err.begin(), finished.err.end(), '\n'), 1) << finished.err;
  for (const std::string& word : words) {
    EXPECT_NE(finished.err.find(word), std::string::npos) << "'" << word << "' is not in: " << finished.err;
  }
}

inline const std::string& model_path() {
  static const std::string path = NARROWS_MODELS_DIR "/SmolLM2-135M-Instruct.Q4_1.gguf";
  return path;
}

}  // namespace narrows::testing
