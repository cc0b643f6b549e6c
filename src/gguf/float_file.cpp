// By ggml's reader and writer; its accessors abort on a wrong type, so nothing is asked before it is checked.
#include "gguf/float_file.h"

#include <cmath>
#include <new>

#include "base/file.h"
#include "ggml.h"
#include "gguf.h"

namespace narrows {

namespace {

struct FreeGguf {
  void operator()(gguf_context* g) const { gguf_free(g); }
};
struct FreeGgml {
  void operator()(ggml_context* g) const { ggml_free(g); }
};
struct CloseFile {
  void operator()(std::FILE* f) const { std::fclose(f); }
};
using Gguf = std::unique_ptr<gguf_context, FreeGguf>;
using File = std::unique_ptr<std::FILE, CloseFile>;

}  // namespace

// --- writing

struct FloatFileWriter::Impl {
  Gguf gguf;
  std::unique_ptr<ggml_context, FreeGgml> shapes;
};

FloatFileWriter::FloatFileWriter(size_t n_tensor) : impl_(std::make_unique<Impl>()) {
  impl_->gguf.reset(gguf_init_empty());
  impl_->shapes.reset(
      ggml_init({.mem_size = n_tensor * ggml_tensor_overhead(), .mem_buffer = nullptr, .no_alloc = true}));
  if (!impl_->shapes) throw std::bad_alloc();
}
FloatFileWriter::~FloatFileWriter() = default;

void FloatFileWriter::text(const char* key, const std::string& value) {
  gguf_set_val_str(impl_->gguf.get(), key, value.c_str());
}
void FloatFileWriter::count(const char* key, uint32_t value) {
  gguf_set_val_u32(impl_->gguf.get(), key, value);
}
void FloatFileWriter::long_count(const char* key, int64_t value) {
  gguf_set_val_i64(impl_->gguf.get(), key, value);
}

void FloatFileWriter::tensor(const std::string& name, int64_t rows, int64_t columns) {
  // ggml's shapes are reversed: ne[0] is the fastest dimension.
  ggml_tensor* t = rows == 1 ? ggml_new_tensor_1d(impl_->shapes.get(), GGML_TYPE_F32, columns)
                             : ggml_new_tensor_2d(impl_->shapes.get(), GGML_TYPE_F32, columns, rows);
  ggml_set_name(t, name.c_str());
  gguf_add_tensor(impl_->gguf.get(), t);
}

void FloatFileWriter::write_head(std::FILE* file) const {
  std::vector<char> head(gguf_get_meta_size(impl_->gguf.get()));
  gguf_get_meta_data(impl_->gguf.get(), head.data());
  std::fwrite(head.data(), 1, head.size(), file);
}

void FloatFileWriter::write(std::span<const float> numbers, std::FILE* file) const {
  std::fwrite(numbers.data(), 1, numbers.size_bytes(), file);
  for (size_t i = numbers.size_bytes(); i % gguf_get_alignment(impl_->gguf.get()) != 0; ++i)
    std::fputc(0, file);
}

// --- reading

struct FloatFileReader::Impl {
  std::string path;
  File file;
  Gguf gguf;
  uint64_t file_bytes = 0;

  /// The key's index if it is there with this type; else -1, and status says what is wrong.
  int64_t key(const char* name, gguf_type type, Status& status) const {
    const int64_t id = gguf_find_key(gguf.get(), name);
    if (id >= 0 && gguf_get_kv_type(gguf.get(), id) == type) return id;
    if (status.ok()) {
      status = {StatusCode::invalid_file,
                path + ": " + (id < 0 ? "it lacks " : "of the wrong type is ") + name};
    }
    return -1;
  }
};

FloatFileReader::FloatFileReader(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
FloatFileReader::~FloatFileReader() = default;
FloatFileReader::FloatFileReader(FloatFileReader&&) noexcept = default;

Result<FloatFileReader> FloatFileReader::open(const std::string& path, const std::string& what,
                                              const std::string& maker) {
  if (Status s = check_readable(path, /*regular=*/true); !s.ok()) return s;
  File file(std::fopen(path.c_str(), "rb"));
  if (!file || fseeko(file.get(), 0, SEEK_END) != 0)
    return Status{StatusCode::invalid_file, path + ": the " + what + " cannot be read as a file on disk"};
  const off_t size = ftello(file.get());
  // ggml says why it refuses a file on its own log; a file that is not GGUF at all should not get that far.
  char magic[4] = {};
  if (size < 4 || fseeko(file.get(), 0, SEEK_SET) != 0 || std::fread(magic, 1, 4, file.get()) != 4 ||
      std::string(magic, 4) != "GGUF" || fseeko(file.get(), 0, SEEK_SET) != 0) {
    return Status{StatusCode::invalid_file,
                  path + ": not a " + what + " (not GGUF); " + maker + " makes one"};
  }
  Gguf gguf(gguf_init_from_file_ptr(file.get(), {.no_alloc = true, .ctx = nullptr}));
  if (!gguf) return Status{StatusCode::invalid_file, path + ": the " + what + " is cut off or damaged"};
  auto impl = std::make_unique<Impl>();
  *impl = {path, std::move(file), std::move(gguf), static_cast<uint64_t>(size)};
  return FloatFileReader(std::move(impl));
}

Status FloatFileReader::bad(const std::string& what) const {
  return {StatusCode::invalid_file, impl_->path + ": " + what};
}

std::string FloatFileReader::text(const char* key, Status& status) const {
  const int64_t id = impl_->key(key, GGUF_TYPE_STRING, status);
  return id < 0 ? std::string() : gguf_get_val_str(impl_->gguf.get(), id);
}
int64_t FloatFileReader::count(const char* key, Status& status) const {
  const int64_t id = impl_->key(key, GGUF_TYPE_UINT32, status);
  return id < 0 ? -1 : gguf_get_val_u32(impl_->gguf.get(), id);
}
int64_t FloatFileReader::long_count(const char* key, Status& status) const {
  const int64_t id = impl_->key(key, GGUF_TYPE_INT64, status);
  return id < 0 ? -1 : gguf_get_val_i64(impl_->gguf.get(), id);
}

Status FloatFileReader::tensor(const std::string& name, int64_t rows, int64_t columns,
                               std::vector<float>& to) {
  gguf_context* gguf = impl_->gguf.get();
  const int64_t id = gguf_find_tensor(gguf, name.c_str());
  if (id < 0) return bad("it lacks tensor " + name);
  const int64_t* ne = gguf_get_tensor_ne(gguf, id);
  if (gguf_get_tensor_type(gguf, id) != GGML_TYPE_F32 || ne[0] != columns || ne[1] != rows || ne[2] != 1 ||
      ne[3] != 1)
    return bad("tensor " + name + " is not F32 [" + std::to_string(rows) + ", " + std::to_string(columns) +
               "]");
  // The shape is the caller's, so the sums below cannot overflow; the offset is anything.
  const uint64_t bytes = static_cast<uint64_t>(rows) * static_cast<uint64_t>(columns) * sizeof(float);
  const uint64_t base = gguf_get_data_offset(gguf), offset = gguf_get_tensor_offset(gguf, id);
  const uint64_t all = impl_->file_bytes;
  if (base > all || offset > all - base || bytes > all - base - offset)
    return bad("it is cut off within tensor " + name);
  to.resize(static_cast<size_t>(rows * columns));
  if (fseeko(impl_->file.get(), static_cast<off_t>(base + offset), SEEK_SET) != 0 ||
      std::fread(to.data(), 1, bytes, impl_->file.get()) != bytes)
    return bad("tensor " + name + " could not be read");
  for (const float x : to) {
    if (!std::isfinite(x)) return bad("tensor " + name + " holds a number that is not finite");
  }
  return {};
}

}  // namespace narrows
