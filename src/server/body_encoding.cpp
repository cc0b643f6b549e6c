#include "server/body_encoding.h"

#include <fmt/format.h>
#include <zlib.h>

#include <algorithm>
#include <cctype>
#include <limits>

namespace narrows::server {

namespace {

class Inflater {
 public:
  Inflater() { ready_ = inflateInit2(&z_, kWindow) == Z_OK; }
  ~Inflater() {
    if (ready_) inflateEnd(&z_);
  }
  Inflater(const Inflater&) = delete;
  Inflater& operator=(const Inflater&) = delete;

  /// false: the data are damaged, end too early, or go on behind their end. `out` stops growing above
  /// max_bytes.
  bool inflate_all(const std::string& body, size_t max_bytes, std::string& out) {
    if (!ready_) throw std::bad_alloc();
    if (body.size() > std::numeric_limits<uInt>::max()) return false;
    z_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(body.data()));  // it reads them only
    z_.avail_in = static_cast<uInt>(body.size());
    Bytef piece[1 << 14];
    int state = Z_OK;
    while (state == Z_OK && out.size() <= max_bytes) {
      z_.next_out = piece;
      z_.avail_out = sizeof(piece);
      state = inflate(&z_, Z_NO_FLUSH);
      if (state == Z_MEM_ERROR) throw std::bad_alloc();
      out.append(reinterpret_cast<const char*>(piece), sizeof(piece) - z_.avail_out);
    }
    return out.size() > max_bytes || (state == Z_STREAM_END && z_.avail_in == 0);
  }

 private:
  static constexpr int kWindow = 32 + 15;  ///< any, gzip's and zlib's headers alike
  z_stream z_ = {};
  bool ready_ = false;
};

}  // namespace

bool decode_body(const std::string& encoding, const std::string& body, size_t max_bytes, std::string& out,
                 ApiError& error) {
  std::string name = encoding;
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  if (name == "identity") {
    out = body;
    return true;
  }
  if (name != "gzip" && name != "x-gzip" && name != "deflate") {
    error = http_error(415, "Content-Encoding must be gzip, deflate or identity");
    return false;
  }
  if (!Inflater().inflate_all(body, max_bytes, out)) {
    error = http_error(400, fmt::format("the body is not what its Content-Encoding, {}, says", name));
    return false;
  }
  if (out.size() <= max_bytes) return true;
  error = http_error(413, "the body is larger than this server takes");
  return false;
}

}  // namespace narrows::server
