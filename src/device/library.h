// libnarrows_cuda.so, found and checked at run time: beside the program, in cuda/ or ../lib beside it, or
// where the system looks for libraries. A program without it, or on a machine without a driver, does all its
// work on the CPU.
#pragma once

#include <string>
#include <string_view>

#include "device/device_api.h"
#include "narrows/status.h"

namespace narrows::device {

/// What `--device` asks for.
struct Choice {
  enum class Kind { cpu, cuda, automatic };
  Kind kind = Kind::cpu;
  int index = 0;  ///< of cuda
};

/// cpu, auto, cuda or cuda:N. invalid_argument says so.
Result<Choice> parse_choice(std::string_view text);

/// The library's table; loaded once a process. unsupported: it is not there, cannot be loaded, or is of
/// another version than the program. `path`: this file and no other; empty: as above. Thread-safe.
Result<const Api*> load_library(const std::string& path = {});
/// For tests: what load_library() gives from now on; null: the file's again.
void use_library(const Api* api);

/// unsupported, in one sentence with what to do: no driver, one that is too old, no card, none of this
/// number, a card that is too old.
Status check_card(const Api& api, int index, Info* info);

}  // namespace narrows::device
