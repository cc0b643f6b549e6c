// Bodies that a client has compressed.
#pragma once

#include <cstddef>
#include <string>

#include "server/api_error.h"

namespace narrows::server {

/// A body as the client meant it, out of one with this Content-Encoding: gzip, deflate, identity. False:
/// another encoding (415), no such data (400) or more than max_bytes of them (413); error says so.
bool decode_body(const std::string& encoding, const std::string& body, size_t max_bytes, std::string& out,
                 ApiError& error);

}  // namespace narrows::server
