#include "server/json_tree.h"

#include <fmt/format.h>

#include <unordered_map>
#include <vector>

namespace narrows::server {

namespace {

/// From so many keys on they are looked up in a table.
constexpr size_t kFewKeys = 16;
constexpr int kNumberOutOfRange = 406;  ///< of nlohmann's exceptions

class Builder : public nlohmann::json_sax<Json> {
 public:
  Json root;
  std::string error;

  bool null() override { return put(Json()); }
  bool boolean(bool value) override { return put(Json(value)); }
  bool number_integer(number_integer_t value) override { return put(Json(value)); }
  bool number_unsigned(number_unsigned_t value) override { return put(Json(value)); }
  bool number_float(number_float_t value, const string_t& /*text*/) override { return put(Json(value)); }
  bool string(string_t& value) override { return put(Json(std::move(value))); }
  bool binary(binary_t& /*value*/) override { return false; }
  bool start_object(size_t /*size*/) override { return open(Json::object()); }
  bool start_array(size_t /*size*/) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& name) override {
    if (++n_fields_ > kMaxJsonFields) {
      error = fmt::format("has more than {} fields", kMaxJsonFields);
      return false;
    }
    Open& top = open_.back();
    // A vector of pairs, which its own functions search each time.
    std::vector<Json::object_t::value_type>& pairs = *top.json->get_ptr<Json::object_t*>();
    top.field = find(top, pairs, name);
    if (top.field == pairs.size()) {
      if (pairs.size() >= kFewKeys) {
        if (top.table.empty())
          for (size_t i = 0; i < pairs.size(); ++i) top.table.emplace(pairs[i].first, i);
        top.table.emplace(name, pairs.size());
      }
      pairs.emplace_back(std::move(name), Json());
    }
    return true;
  }

  bool parse_error(size_t at, const std::string& /*token*/, const Json::exception& what) override {
    error = what.id == kNumberOutOfRange ? "is not JSON: it holds a number that is too large"
                                         : fmt::format("is not JSON: it goes wrong at byte {}", at);
    return false;
  }

 private:
  /// An object or array that has not ended. Its address stays: nothing is put beside it before it ends.
  struct Open {
    Json* json;
    size_t field = 0;                               ///< of an object: index of the key that came last
    std::unordered_map<std::string, size_t> table;  ///< indices of keys, if they are many
  };

  static size_t find(const Open& top, const std::vector<Json::object_t::value_type>& pairs,
                     const std::string& name) {
    if (!top.table.empty()) {
      const auto found = top.table.find(name);
      return found == top.table.end() ? pairs.size() : found->second;
    }
    size_t i = 0;
    while (i < pairs.size() && pairs[i].first != name) ++i;
    return i;
  }

  Json* place(Json value) {
    if (open_.empty()) {
      root = std::move(value);
      return &root;
    }
    Open& top = open_.back();
    if (top.json->is_array()) {
      auto& items = *top.json->get_ptr<Json::array_t*>();
      items.push_back(std::move(value));
      return &items.back();
    }
    std::vector<Json::object_t::value_type>& pairs = *top.json->get_ptr<Json::object_t*>();
    return &(pairs[top.field].second = std::move(value));
  }
  bool put(Json value) {
    place(std::move(value));
    return true;
  }
  bool open(Json empty) {
    Json* const at = place(std::move(empty));
    open_.push_back({at, 0, {}});
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  std::vector<Open> open_;
  size_t n_fields_ = 0;
};

}  // namespace

std::optional<Json> parse_json(std::string_view text, std::string& error) {
  Builder builder;
  if (Json::sax_parse(text, &builder)) return std::move(builder.root);
  error = std::move(builder.error);
  return std::nullopt;
}

}  // namespace narrows::server
