// Files: each way of not reading has its own sentence; a failed write leaves the old file and no temporary
// one.
#include "base/file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string>

#include "temp_dir.h"

namespace narrows {
namespace {

using ::testing::HasSubstr;
using testing::TempDir;

constexpr int64_t kMiB = 1 << 20;

Status put(const std::string& path, const std::string& bytes) {
  return write_file_atomically(path, [&](std::FILE* file) {
    (void)std::fwrite(bytes.data(), 1, bytes.size(), file);
    return Status();
  });
}

TEST(ReadFile, RegularFilesAloneWhereAsked) {
  const TempDir dir;
  const std::string pipe = dir.path("pipe"), link = dir.path("zero");
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  ASSERT_EQ(::symlink("/dev/zero", link.c_str()), 0);
  for (const std::string& path : {pipe, link, std::string("/dev/null")}) {
    EXPECT_THAT(read_file(path, kMiB, true).status().message(), HasSubstr("not a regular file")) << path;
    EXPECT_THAT(check_readable(path, true).message(), HasSubstr("not a regular file")) << path;
  }
  EXPECT_EQ(*read_file("/dev/null", kMiB), "");
  EXPECT_EQ(*read_file(dir.file("a", "b"), kMiB, true), "b");
}

TEST(ReadFile, GivesEveryByte) {
  const TempDir dir;
  std::string bytes(300'000, '\0');  // several chunks, NUL and CR LF in it
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * 7 + (i >> 8));
  const Result<std::string> content = read_file(dir.file("a", bytes), kMiB);
  ASSERT_TRUE(content.ok()) << content.status().message();
  EXPECT_EQ(*content, bytes);
  EXPECT_EQ(*read_file(dir.file("empty", ""), kMiB), "");
}

TEST(ReadFile, SaysWhatIsWrong) {
  const TempDir dir;
  const Result<std::string> missing = read_file(dir.path("none"), kMiB);
  EXPECT_EQ(missing.status().code(), StatusCode::invalid_file);
  EXPECT_THAT(missing.status().message(), HasSubstr("no such file"));
  EXPECT_THAT(missing.status().message(), HasSubstr(dir.path("none")));
  EXPECT_THAT(read_file(dir.path(""), kMiB).status().message(), HasSubstr("folder, not a file"));
  EXPECT_THAT(read_file(dir.file("a", "x") + "/b", kMiB).status().message(), HasSubstr("not a folder"));
  EXPECT_THAT(read_file("", kMiB).status().message(), HasSubstr("name is empty"));
  EXPECT_EQ(read_file("", kMiB).status().code(), StatusCode::invalid_file);
}

TEST(ReadFile, RespectsPermissions) {
  if (::geteuid() == 0) GTEST_SKIP() << "root may read everything";
  const TempDir dir;
  const std::string path = dir.file("secret", "x");
  ASSERT_EQ(::chmod(path.c_str(), 0), 0);
  EXPECT_THAT(read_file(path, kMiB).status().message(), HasSubstr("permission denied"));
}

TEST(ReadFile, StopsAtTheLimit) {
  const TempDir dir;
  const std::string path = dir.file("a", "12345");
  EXPECT_EQ(*read_file(path, 5), "12345");
  EXPECT_THAT(read_file(path, 4).status().message(), HasSubstr("more than 4 bytes"));
  // A device has no size to look at beforehand: reading itself has to stop.
  EXPECT_THAT(read_file("/dev/zero", kMiB).status().message(), HasSubstr("more than 1048576 bytes"));
}

TEST(ReadFile, ReportsFailureOnTheWay) {
  // Reading address 0 of one's own memory is an error that open() does not see.
  const Result<std::string> content = read_file("/proc/self/mem", kMiB);
  EXPECT_EQ(content.status().code(), StatusCode::io_error);
}

TEST(WriteFile, ReplacesTheWholeFile) {
  const TempDir dir;
  const std::string path = dir.file("a", "a much longer old content");
  ASSERT_TRUE(put(path, "new").ok());
  EXPECT_EQ(*read_file(path, kMiB), "new");
  ASSERT_TRUE(put(dir.path("b"), "").ok());
  EXPECT_EQ(*read_file(dir.path("b"), kMiB), "");
  EXPECT_EQ(dir.count(), 2U);
}

TEST(WriteFile, FollowsALink) {
  const TempDir dir;
  const std::string real = dir.file("real", "old");
  ASSERT_EQ(::symlink(real.c_str(), dir.path("link").c_str()), 0);
  ASSERT_TRUE(put(dir.path("link"), "new").ok());
  EXPECT_EQ(*read_file(real, kMiB), "new");
  struct stat info = {};
  ASSERT_EQ(::lstat(dir.path("link").c_str(), &info), 0);
  EXPECT_TRUE(S_ISLNK(info.st_mode));
}

TEST(WriteFile, KeepsTheOldFileWhenTheWriterFails) {
  const TempDir dir;
  const std::string path = dir.file("a", "old");
  const Status status = write_file_atomically(path, [](std::FILE* file) {
    (void)std::fputs("half of it", file);
    return Status(StatusCode::cancelled, "stopped");
  });
  EXPECT_EQ(status.code(), StatusCode::cancelled);
  EXPECT_EQ(status.message(), "stopped");
  EXPECT_EQ(*read_file(path, kMiB), "old");
  EXPECT_EQ(dir.count(), 1U);  // no temporary file
}

TEST(CheckWritable, SaysWhatWritingWouldAndLeavesNothing) {
  const TempDir dir;
  EXPECT_TRUE(check_writable(dir.path("new")).ok());
  EXPECT_EQ(dir.count(), 0U);
  const std::string old = dir.file("old", "content");
  EXPECT_TRUE(check_writable(old).ok());
  EXPECT_EQ(*read_file(old, kMiB), "content");
  EXPECT_EQ(check_writable(dir.path("no/such/folder")).code(), StatusCode::invalid_argument);
  EXPECT_EQ(check_writable("/dev/full").code(), StatusCode::invalid_argument);
  EXPECT_EQ(check_writable("").code(), StatusCode::invalid_argument);
}

TEST(WriteFile, KeepsTheOldFileWhenWritingFails) {
  // A limit on the file size fails write() as a full disk does, without needing a disk of its own.
  const TempDir dir;
  const std::string path = dir.file("a", "old");
  rlimit before = {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  auto* const handler = ::signal(SIGXFSZ, SIG_IGN);
  const rlimit small = {4096, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const Status in_fwrite = put(path, std::string(kMiB, 'x'));  // larger than stdio's buffer
  const Status in_flush = put(path, std::string(4097, 'x'));   // may wait in the buffer until fflush
  const Status fits = put(dir.path("b"), std::string(4096, 'x'));
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  (void)::signal(SIGXFSZ, handler);
  EXPECT_EQ(in_fwrite.code(), StatusCode::io_error);
  EXPECT_EQ(in_flush.code(), StatusCode::io_error);
  EXPECT_THAT(in_fwrite.message(), HasSubstr("File too large"));
  EXPECT_TRUE(fits.ok());
  EXPECT_EQ(*read_file(path, kMiB), "old");
  EXPECT_EQ(dir.count(), 2U);
}

TEST(WriteFile, RefusesWhatIsNotAFile) {
  const TempDir dir;
  EXPECT_EQ(put(dir.path(""), "x").code(), StatusCode::invalid_argument);
  EXPECT_THAT(put(dir.path("no/such/folder"), "x").message(), HasSubstr("folder does not exist"));
  // Root could rename a file over the device node.
  EXPECT_THAT(put("/dev/null", "x").message(), HasSubstr("device"));
  struct stat info = {};
  ASSERT_EQ(::stat("/dev/null", &info), 0);
  EXPECT_TRUE(S_ISCHR(info.st_mode));
}

TEST(ByteOrderMark, IsDroppedAtTheBeginningOnly) {
  for (const auto& [text, want] : std::initializer_list<std::pair<std::string, std::string>>{
           {"\xEF\xBB\xBFx", "x"},
           {"\xEF\xBB\xBF", ""},
           {"\xEF\xBB\xBF\xEF\xBB\xBFx", "\xEF\xBB\xBFx"},
           {"x\xEF\xBB\xBF", "x\xEF\xBB\xBF"},
           {"\xEF\xBB", "\xEF\xBB"},
           {"", ""}}) {
    std::string got = text;
    drop_byte_order_mark(got);
    EXPECT_EQ(got, want);
  }
}

}  // namespace
}  // namespace narrows
