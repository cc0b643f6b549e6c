// JSON text to a tree in linear time: nlohmann's own parser looks for each key of an ordered object among all
// those before it.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

namespace narrows::server {

using Json = nlohmann::ordered_json;

/// Fields of all objects of a request together; a bias of each token is far below.
inline constexpr size_t kMaxJsonFields = 1'000'000;

/// Objects keep the order of their keys; of equal keys the last has the value. The text must not be nested
/// deeper than the stack allows. Nothing: `error` says where it goes wrong ("is not JSON: ..."). Throws
/// std::bad_alloc.
std::optional<Json> parse_json(std::string_view text, std::string& error);

}  // namespace narrows::server
