// POSIX file calls, each failure turned into one sentence that names the file.
#include "base/file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <memory>
#include <new>
#include <system_error>

#include "base/utf8.h"

namespace narrows {
namespace {

std::string system_text(int error) { return std::generic_category().message(error); }

Status cannot_open(const std::string& path, int error) {
  switch (error) {
    case ENOENT:
      return {StatusCode::invalid_file, fmt::format("cannot read {}: there is no such file", quote(path))};
    case ENOTDIR:
      return {StatusCode::invalid_file,
              fmt::format("cannot read {}: a part of the path is not a folder", quote(path))};
    case EACCES:
    case EPERM:
      return {StatusCode::invalid_file, fmt::format("cannot read {}: permission denied", quote(path))};
    default:
      return {StatusCode::invalid_file, fmt::format("cannot read {}: {}", quote(path), system_text(error))};
  }
}

Status not_regular(const std::string& path) {
  return {StatusCode::invalid_file,
          fmt::format("cannot read {}: it is a device or pipe, not a regular file", quote(path))};
}

/// Closes on destruction; -1 holds nothing.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

/// Removes the file on destruction unless told that it was renamed.
class TemporaryFile {
 public:
  explicit TemporaryFile(std::string path) : path_(std::move(path)) {}
  ~TemporaryFile() {
    if (!kept_) ::unlink(path_.c_str());
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  void keep() { kept_ = true; }

 private:
  std::string path_;
  bool kept_ = false;
};

Status write_failed(const std::string& path, int error) {
  if (error == ENOSPC || error == EDQUOT) {
    return {StatusCode::disk_full, fmt::format("cannot write {}: no room on the disk", quote(path))};
  }
  return {StatusCode::io_error,
          fmt::format("cannot write {}: {}", quote(path), system_text(error == 0 ? EIO : error))};
}

Status cannot_create(const std::string& path, int error) {
  if (error == ENOENT || error == ENOTDIR) {
    return {StatusCode::invalid_argument,
            fmt::format("cannot write {}: the folder does not exist", quote(path))};
  }
  if (error == EACCES || error == EPERM || error == EROFS) {
    return {StatusCode::invalid_argument, fmt::format("cannot write {}: permission denied", quote(path))};
  }
  return write_failed(path, error);
}

Status check_target(const std::string& path) {
  if (path.empty()) return {StatusCode::invalid_argument, "cannot write a file: its name is empty"};
  struct stat info = {};
  if (::stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) {
    // A rename onto /dev/null would replace the device by a file.
    return {StatusCode::invalid_argument,
            fmt::format("cannot write {}: it is {}, not a regular file", quote(path),
                        S_ISDIR(info.st_mode) ? "a folder" : "a device or pipe")};
  }
  return {};
}

/// Where a symbolic link leads, so that the rename replaces the file and not the link.
std::string resolved(const std::string& path) {
  const std::unique_ptr<char, decltype(&std::free)> real(::realpath(path.c_str(), nullptr), &std::free);
  return real ? std::string(real.get()) : path;
}

std::string temporary_name(const std::string& path) {
  static std::atomic<unsigned> counter{0};
  return fmt::format("{}.partial-{}-{}", path, ::getpid(), counter.fetch_add(1));
}

/// The rename itself reaches the disk only with its folder. Not every file system can do it: best effort.
void sync_folder_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  const Descriptor fd(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd.get() >= 0) (void)::fsync(fd.get());
}

/// An error of write() shows up in fwrite, in fflush or only in fsync and close: all four are looked at.
Status write_and_close(const std::string& path, std::FILE* file, const FileWriter& writer) {
  errno = 0;
  Status status = writer(file);
  int error = errno;
  if (std::ferror(file) != 0) {
    status = write_failed(path, error);
  } else if (status.ok()) {
    // Some file systems cannot sync; that is no failure of the write.
    const bool flushed = std::fflush(file) == 0;
    const bool synced = flushed && (::fsync(::fileno(file)) == 0 || errno == EINVAL || errno == ENOTSUP);
    if (!synced) status = write_failed(path, errno);
  }
  const bool closed = std::fclose(file) == 0;
  error = errno;
  if (status.ok() && !closed) return write_failed(path, error);
  return status;
}

}  // namespace

Status check_readable(const std::string& path, bool regular) {
  if (path.empty()) return {StatusCode::invalid_file, "cannot read a file: its name is empty"};
  if (path.find('\0') != std::string::npos) return cannot_open(path, ENOENT);
  struct stat info = {};
  if (::stat(path.c_str(), &info) != 0) return cannot_open(path, errno);
  if (S_ISDIR(info.st_mode)) {
    return {StatusCode::invalid_file, fmt::format("cannot read {}: it is a folder, not a file", quote(path))};
  }
  if (regular && !S_ISREG(info.st_mode)) return not_regular(path);
  if (::access(path.c_str(), R_OK) != 0) return cannot_open(path, errno);
  return {};
}

Result<std::string> read_file(const std::string& path, int64_t max_bytes, bool regular) {
  if (Status status = check_readable(path, regular); !status.ok()) return status;
  // A pipe that takes a file's place now must not wait for its writer either.
  const Descriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | (regular ? O_NONBLOCK : 0)));
  if (fd.get() < 0) return cannot_open(path, errno);
  const auto too_large = [&] {
    return Status(StatusCode::invalid_file,
                  fmt::format("cannot read {}: it has more than {} bytes", quote(path), max_bytes));
  };

  struct stat info = {};
  const bool sized = ::fstat(fd.get(), &info) == 0 && S_ISREG(info.st_mode);
  if (regular && !sized) return not_regular(path);
  if (sized && info.st_size > max_bytes) return too_large();

  try {
    std::string content;
    if (sized) content.reserve(static_cast<size_t>(info.st_size));
    constexpr size_t kChunk = size_t{1} << 16;  // the size is only a hint: pipes and /proc have none
    while (true) {
      const size_t filled = content.size();
      content.resize(filled + kChunk);
      const ssize_t got = ::read(fd.get(), content.data() + filled, kChunk);
      const int error = errno;
      content.resize(filled + static_cast<size_t>(std::max<ssize_t>(got, 0)));
      if (got == 0) return content;
      if (got < 0 && error != EINTR) {
        return {StatusCode::io_error, fmt::format("reading {} failed: {}", quote(path), system_text(error))};
      }
      if (static_cast<int64_t>(content.size()) > max_bytes) return too_large();
    }
  } catch (const std::bad_alloc&) {
    return {StatusCode::out_of_memory, fmt::format("no memory to read {}", quote(path))};
  }
}

void drop_byte_order_mark(std::string& text) {
  constexpr std::string_view kMark = "\xEF\xBB\xBF";
  if (text.compare(0, kMark.size(), kMark) == 0) text.erase(0, kMark.size());
}

Status check_writable(const std::string& path) {
  if (Status status = check_target(path); !status.ok()) return status;
  const std::string name = temporary_name(resolved(path));
  const int fd = ::open(name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd < 0) return cannot_create(path, errno);
  const TemporaryFile temporary(name);
  ::close(fd);
  return {};
}

Status write_file_atomically(const std::string& path, const FileWriter& writer) {
  if (Status status = check_target(path); !status.ok()) return status;
  const std::string target = resolved(path);
  const std::string name = temporary_name(target);
  const int fd = ::open(name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd < 0) return cannot_create(path, errno);
  TemporaryFile temporary(name);
  std::FILE* file = ::fdopen(fd, "wb");
  if (file == nullptr) {
    const int error = errno;
    ::close(fd);
    return write_failed(path, error);
  }
  if (Status status = write_and_close(path, file, writer); !status.ok()) return status;
  if (::rename(name.c_str(), target.c_str()) != 0) return cannot_create(path, errno);
  temporary.keep();
  sync_folder_of(target);
  return {};
}

}  // namespace narrows
