#include "device/library.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <unistd.h>

#include <charconv>
#include <climits>
#include <mutex>
#include <vector>

namespace narrows::device {

namespace {

constexpr const char* kFile = "libnarrows_cuda.so";
constexpr int kLeastMajor = 8;

/// The folder of the running program; empty if the system does not say.
std::string program_folder() {
  std::string path(PATH_MAX, '\0');
  const ssize_t n = readlink("/proc/self/exe", path.data(), path.size());
  if (n <= 0) return {};
  path.resize(static_cast<size_t>(n));
  return path.substr(0, path.rfind('/'));
}

Result<const Api*> open_library(const std::string& path) {
  std::vector<std::string> files;
  if (!path.empty()) files.push_back(path);
  if (const std::string folder = program_folder(); !folder.empty()) {
    for (const char* place : {"/", "/cuda/", "/../lib/"}) files.push_back(folder + place + kFile);
  }
  files.emplace_back(kFile);
  std::string first_fault;
  for (const std::string& file : files) {
    // Stays loaded: the driver has threads in it.
    void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* why = dlerror();
      const bool is_there = file.find('/') != std::string::npos && access(file.c_str(), F_OK) == 0;
      if (is_there || !path.empty())
        first_fault = fmt::format("{} cannot be loaded: {}", file, why != nullptr ? why : "no reason given");
      if (!first_fault.empty()) break;
      continue;
    }
    void* symbol = dlsym(library, kApiSymbol);
    if (symbol == nullptr)
      return Status(StatusCode::unsupported,
                    fmt::format("{} is not of this program's version; build it again (make cuda)", file));
    const Api* api = reinterpret_cast<ApiFunction*>(symbol)();
    if (api->version != kApiVersion) {
      return Status(StatusCode::unsupported,
                    fmt::format("{} speaks version {} of the device's functions and this program version {}; "
                                "build it again (make cuda)",
                                file, api->version, kApiVersion));
    }
    return api;
  }
  if (!first_fault.empty()) return Status(StatusCode::unsupported, first_fault);
  return Status(StatusCode::unsupported,
                fmt::format("there is no {} beside the program, which --device cuda needs; build it (make "
                            "cuda) and put it there, or take --device cpu",
                            kFile));
}

std::mutex library_mutex;
const Api* loaded = nullptr;

std::string version_text(int version) { return fmt::format("{}.{}", version / 1000, version % 1000 / 10); }

}  // namespace

Result<Choice> parse_choice(std::string_view text) {
  if (text == "cpu") return Choice{Choice::Kind::cpu, 0};
  if (text == "auto") return Choice{Choice::Kind::automatic, 0};
  if (text == "cuda") return Choice{Choice::Kind::cuda, 0};
  constexpr std::string_view kPrefix = "cuda:";
  if (text.substr(0, kPrefix.size()) == kPrefix) {
    const std::string_view number = text.substr(kPrefix.size());
    int index = 0;
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), index);
    if (error == std::errc() && end == number.data() + number.size() && index >= 0)
      return Choice{Choice::Kind::cuda, index};
  }
  return Status(StatusCode::invalid_argument,
                "a device is cpu, cuda, cuda:N (the GPU of this number) or auto");
}

Result<const Api*> load_library(const std::string& path) {
  if (!path.empty()) return open_library(path);
  const std::lock_guard<std::mutex> lock(library_mutex);
  if (loaded != nullptr) return loaded;
  Result<const Api*> api = open_library({});
  if (api.ok()) loaded = *api;
  return api;
}

void use_library(const Api* api) {
  const std::lock_guard<std::mutex> lock(library_mutex);
  loaded = api;
}

Status check_card(const Api& api, int index, Info* info) {
  int n = 0, driver = 0, needed = 0;
  if (api.count(&n, &driver, &needed) != 0)
    return {StatusCode::unsupported, fmt::format("the GPU's driver answers: {}", api.error())};
  if (driver == 0)
    return {StatusCode::unsupported, "there is no NVIDIA driver on this machine, which --device cuda needs"};
  if (driver / 1000 < needed / 1000) {
    return {
        StatusCode::unsupported,
        fmt::format("the NVIDIA driver is too old: it knows CUDA {}, and {} is needed; install a newer one",
                    version_text(driver), version_text(needed))};
  }
  if (n == 0) return {StatusCode::unsupported, "the NVIDIA driver finds no GPU that this process may use"};
  if (index >= n) {
    return {StatusCode::unsupported,
            fmt::format("there is no GPU {}: the driver finds {}, counted from 0", index, n)};
  }
  const int code = api.info(index, info);
  if (code != 0 && info->major > 0 && info->major < kLeastMajor) {
    return {StatusCode::unsupported,
            fmt::format("GPU {} ({}) is too old: its compute capability is {}.{}, and {}.0 is the least",
                        index, info->name, info->major, info->minor, kLeastMajor)};
  }
  if (code != 0) {
    return {StatusCode::unsupported,
            fmt::format("GPU {} cannot be used: {}",
                        info->name[0] != '\0' ? info->name : std::to_string(index), api.error())};
  }
  return {};
}

}  // namespace narrows::device
