#include "sample/schema_check.h"

#include <fmt/format.h>
#include <json-schema-to-grammar.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "base/utf8.h"

namespace narrows {

namespace {

/// Schemas within schemas, references followed. The converter takes some 4 KB of stack each.
constexpr int kMaxDepth = 200;
constexpr int kMaxCircle = 1000;  ///< the same of references with nothing in between
/// Values that the converter would copy or visit, far above any schema that a person writes.
constexpr int64_t kMaxNodes = 100'000;
/// Its regular expressions recurse along characters that are neither letters nor digits.
constexpr size_t kMaxName = 1000;
/// Characters of rule names together: it writes each several times.
constexpr int64_t kMaxNameBytes = 2'000'000;
/// Steps of its loops over optional properties, over rules whose names are equal, over rules that it copies
/// for each pattern: a tenth to a half of a microsecond each.
constexpr int64_t kMaxSteps = 2'000'000;

Status refusal(const std::string& what) { return {StatusCode::invalid_argument, what}; }

Status too_large() { return refusal("the schema is too large once its references are followed"); }
Status too_deep() { return refusal(fmt::format("the schema is nested deeper than {} levels", kMaxDepth)); }

/// Goes where common_chat_schema_from_json() goes.
class JsonWalk {
 public:
  explicit JsonWalk(const common_json& root) : root_(root) {}

  Status node(const common_json& schema, int depth, const common_json* type_given = nullptr) {
    if (depth > kMaxDepth) return too_deep();
    if (++nodes_ > kMaxNodes) return too_large();
    if (!schema.is_object()) return {};
    if (schema.contains("$ref")) return reference(schema.at("$ref"), depth);
    for (const char* key : {"oneOf", "anyOf"}) {
      if (schema.contains(key)) return each_of(schema.at(key), depth);
    }
    const common_json* type = type_given != nullptr     ? type_given
                              : schema.contains("type") ? &schema.at("type")
                                                        : nullptr;
    if (type != nullptr && type->is_array()) {
      // The schema is copied once a type.
      for (const auto& one : *type) {
        if (!charge_copy(schema)) return too_large();
        if (Status s = node(schema, depth + 1, &one); !s.ok()) return s;
      }
      return {};
    }
    if (schema.contains("const") || schema.contains("enum")) return {};
    if (Status s = check_numbers(schema, type); !s.ok()) return s;
    const std::string name = type != nullptr && type->is_string() ? type->get<std::string>() : "";
    const bool is_object = schema.contains("properties") || (schema.contains("additionalProperties") &&
                                                             schema.at("additionalProperties") != true);
    const bool takes_all_of = name == "string" || (!is_object && (name == "object" || name.empty()));
    if (takes_all_of && schema.contains("allOf")) return each_of(schema.at("allOf"), depth);
    if (name == "object" || (name.empty() && is_object)) return object(schema, depth);
    return name == "array" || name.empty() ? array(schema, depth) : Status();
  }

 private:
  Status each_of(const common_json& list, int depth) {
    if (!list.is_array()) return {};
    for (const auto& one : list) {
      if (Status s = node(one, depth + 1); !s.ok()) return s;
    }
    return {};
  }

  Status array(const common_json& schema, int depth) {
    for (const char* key : {"items", "prefixItems"}) {
      if (!schema.contains(key)) continue;
      const common_json& value = schema.at(key);
      return value.is_array() ? each_of(value, depth) : node(value, depth + 1);
    }
    return {};
  }

  Status object(const common_json& schema, int depth) {
    if (schema.contains("properties") && schema.at("properties").is_object()) {
      for (const auto& [name, property] : schema.at("properties").items()) {
        // The converter names rules by the path of properties: this one would take its parent's name.
        if (name.empty()) return refusal("a property has an empty name, which is not supported");
        if (name.size() > kMaxName)
          return refusal(fmt::format("a property has a name of {} bytes, at most {} are allowed", name.size(),
                                     kMaxName));
        if (Status s = node(property, depth + 1); !s.ok()) return s;
      }
    }
    if (!schema.contains("additionalProperties")) return {};
    return node(schema.at("additionalProperties"), depth + 1);
  }

  Status reference(const common_json& value, int depth) {
    if (!value.is_string()) return {};
    const auto ref = value.get<std::string>();
    if (ref.size() > kMaxName)
      return refusal(fmt::format("a $ref has {} bytes, at most {} are allowed", ref.size(), kMaxName));
    if (!seen_.insert(ref).second) return {};
    const common_json* target = find(ref);
    return target == nullptr ? Status() : node(*target, depth + 1);
  }

  /// Null: the converter will say that there is none.
  const common_json* find(const std::string& ref) const {
    if (ref.compare(0, 2, "#/") != 0) return nullptr;
    const common_json* at = &root_;
    for (size_t begin = 2; begin <= ref.size();) {
      const size_t end = std::min(ref.find('/', begin), ref.size());
      const std::string name = ref.substr(begin, end - begin);
      begin = end + 1;
      if (at->is_object() && at->contains(name)) {
        at = &at->at(name);
      } else if (at->is_array()) {
        size_t index = at->size();
        try {
          index = std::stoull(name);
        } catch (const std::logic_error&) {
          return nullptr;
        }
        if (index >= at->size()) return nullptr;
        at = &at->at(index);
      } else {
        return nullptr;
      }
    }
    return at;
  }

  bool charge_copy(const common_json& value) {
    if (++nodes_ > kMaxNodes) return false;
    if (value.is_object() || value.is_array()) {
      for (const auto& [key, item] : value.items()) {
        if (!charge_copy(item)) return false;
      }
    }
    return true;
  }

  const common_json& root_;
  std::unordered_set<std::string> seen_;
  int64_t nodes_ = 0;
};

using Node = common_chat_schema;
using NodePtr = common_chat_schema_ptr;

template <typename T>
T& as(Node& node) {
  return static_cast<T&>(node);
}
template <typename T>
const T& as(const Node& node) {
  return static_cast<const T&>(node);
}

std::vector<NodePtr>* children_of_union(Node& node) {
  if (node.kind() == Node::KIND_ANY_OF) return &as<common_chat_schema_any_of>(node).children;
  if (node.kind() == Node::KIND_ALL_OF) return &as<common_chat_schema_all_of>(node).children;
  return nullptr;
}

enum class Pattern { known, unknown, wrong };

/// What the converter makes of a pattern. It would print what it does not know: it is asked in a way that
/// never comes to an end.
Pattern kind_of_pattern(const std::string& pattern) {
  struct Enough {};
  Pattern kind = Pattern::wrong;
  common_chat_schema_string schema;
  schema.pattern = pattern;
  try {
    (void)build_grammar([&](const common_grammar_builder& builder) {
      const std::string name = builder.add_schema("it", schema);
      // A pattern that it does not know became the rule of all strings: the same rule again has the same
      // name.
      if (!name.empty()) kind = builder.add_rule(name, "string") == name ? Pattern::unknown : Pattern::known;
      throw Enough();
    });
  } catch (const Enough&) {
  }
  return kind;
}

class Preparation {
 public:
  Status node(NodePtr& at) {
    // An allOf of one schema is that schema; the converter would lose all but objects in it.
    while (at->kind() == Node::KIND_ALL_OF && as<common_chat_schema_all_of>(*at).children.size() == 1) {
      NodePtr only = std::move(as<common_chat_schema_all_of>(*at).children.front());
      at = std::move(only);
    }
    if (std::vector<NodePtr>* children = children_of_union(*at)) return all(*children);
    switch (at->kind()) {
      case Node::KIND_REF:
        references_.push_back(&as<common_chat_schema_ref>(*at));
        return {};
      case Node::KIND_STRING:
        return pattern(as<common_chat_schema_string>(*at).pattern);
      case Node::KIND_ARRAY:
        return node(as<common_chat_schema_array>(*at).items);
      case Node::KIND_TUPLE:
        return all(as<common_chat_schema_tuple>(*at).items);
      case Node::KIND_OBJECT: {
        auto& object = as<common_chat_schema_object>(*at);
        for (auto& p : object.properties) {
          if (Status s = node(p.schema); !s.ok()) return s;
        }
        return object.additional_properties != nullptr ? node(object.additional_properties) : Status();
      }
      default:
        return {};
    }
  }

  /// What references lead to may have become another node.
  Status target(NodePtr& at) {
    const Node* const before = at.get();
    if (Status s = node(at); !s.ok()) return s;
    if (at.get() != before) moved_[before] = at.get();
    return {};
  }
  void mend_targets() {
    for (common_chat_schema_ref* ref : references_) {
      const auto found = moved_.find(ref->target);
      if (found != moved_.end()) ref->target = found->second;
    }
  }

 private:
  Status all(std::vector<NodePtr>& nodes) {
    for (NodePtr& n : nodes) {
      if (Status s = node(n); !s.ok()) return s;
    }
    return {};
  }

  Status pattern(std::string& text) {
    if (text.empty()) return {};
    const auto [found, is_new] = patterns_.try_emplace(text, Pattern::known);
    if (is_new) found->second = kind_of_pattern(text);
    if (found->second == Pattern::wrong)
      return refusal(fmt::format("the pattern {} is no regular expression", quote(text, 100)));
    if (found->second == Pattern::unknown)
      return refusal(fmt::format("the pattern {} is not followed by this server", quote(text, 100)));
    return {};
  }

  std::map<std::string, Pattern> patterns_;
  std::vector<common_chat_schema_ref*> references_;
  std::unordered_map<const Node*, const Node*> moved_;
};

/// Finds circles of references, anyOf, oneOf, allOf and lists of types: no character comes between.
class Circles {
 public:
  explicit Circles(const SchemaReferences& names) : names_(names) {}

  /// Of what can be reached from this node without a character; follows references.
  Status from(Node& node, int depth = 0) {
    if (depth > kMaxCircle) return too_deep();
    const auto [found, is_new] = state_.try_emplace(&node, false);
    if (!is_new) return found->second ? Status() : refusal(what());
    if (node.kind() == Node::KIND_REF) {
      auto& ref = as<common_chat_schema_ref>(node);
      last_ = &ref;
      if (ref.target != nullptr) {
        if (Status s = from(const_cast<Node&>(*ref.target), depth + 1); !s.ok()) return s;
      }
    } else if (std::vector<NodePtr>* children = children_of_union(node)) {
      for (NodePtr& child : *children) {
        if (Status s = from(*child, depth + 1); !s.ok()) return s;
      }
    }
    state_[&node] = true;
    return {};
  }

  /// Of all that is below this node in the document.
  Status within(Node& node) {
    if (Status s = from(node); !s.ok()) return s;
    if (std::vector<NodePtr>* children = children_of_union(node)) return all(*children);
    switch (node.kind()) {
      case Node::KIND_ARRAY:
        return within(*as<common_chat_schema_array>(node).items);
      case Node::KIND_TUPLE:
        return all(as<common_chat_schema_tuple>(node).items);
      case Node::KIND_OBJECT: {
        auto& object = as<common_chat_schema_object>(node);
        for (auto& p : object.properties) {
          if (Status s = within(*p.schema); !s.ok()) return s;
        }
        return object.additional_properties != nullptr ? within(*object.additional_properties) : Status();
      }
      default:
        return {};
    }
  }

 private:
  std::string what() const {
    return fmt::format("the reference {} leads back to itself with nothing in between",
                       last_ != nullptr ? quote(names_.original(last_->ref), 100) : "");
  }
  Status all(std::vector<NodePtr>& nodes) {
    for (NodePtr& n : nodes) {
      if (Status s = within(*n); !s.ok()) return s;
    }
    return {};
  }

  const SchemaReferences& names_;
  std::unordered_map<const Node*, bool> state_;  ///< false: being walked
  const common_chat_schema_ref* last_ = nullptr;
};

/// Goes where json_schema_to_grammar() goes and counts. Only after Circles.
class Work {
 public:
  explicit Work(const SchemaWork& before) : count_(before) {}
  const SchemaWork& count() const { return count_; }

  Status visit(const Node& node, const std::string& name, int depth) {
    if (depth > kMaxDepth) return too_deep();
    if (++count_.visits > kMaxNodes || !charge_name(name)) return too_large();
    switch (node.kind()) {
      case Node::KIND_REF: {
        const auto& ref = as<common_chat_schema_ref>(node);
        if (ref.target == nullptr || !seen_.insert(ref.ref).second) return {};
        return visit(*ref.target, "ref-" + ref.ref.substr(2), depth + 1);
      }
      case Node::KIND_ANY_OF:
        return each(as<common_chat_schema_any_of>(node).children, name + "-", depth);
      case Node::KIND_TUPLE:
        return each(as<common_chat_schema_tuple>(node).items, name + "-tuple-", depth);
      case Node::KIND_ARRAY:
        return visit(*as<common_chat_schema_array>(node).items, name + "-item", depth + 1);
      case Node::KIND_STRING:
        // It keeps a copy of all rules.
        if (!as<common_chat_schema_string>(node).pattern.empty()) count_.steps += count_.rules;
        return count_.steps > kMaxSteps ? too_large() : Status();
      case Node::KIND_ALL_OF: {
        // Its parts are written out again wherever it stands; no rule of its own ends that.
        if (!open_.insert(&node).second)
          return refusal(
              "an allOf leads back to itself through its own properties; give its parts as one schema");
        std::vector<Property> all;
        for (const NodePtr& child : as<common_chat_schema_all_of>(node).children) {
          if (child->kind() == Node::KIND_ANY_OF) {
            for (const NodePtr& alternative : as<common_chat_schema_any_of>(*child).children)
              add_parts(*alternative, false, all);
          } else {
            add_parts(*child, true, all);
          }
        }
        Status s = object(all, nullptr, name, depth);
        open_.erase(&node);
        return s;
      }
      case Node::KIND_OBJECT: {
        const auto& o = as<common_chat_schema_object>(node);
        std::vector<Property> all;
        for (const auto& p : o.properties) all.push_back({&p, p.required});
        return object(all, o.additional_properties.get(), name, depth);
      }
      default:
        return {};
    }
  }

 private:
  struct Property {
    const common_chat_schema_property* property;
    bool required;
  };

  Status each(const std::vector<NodePtr>& nodes, const std::string& prefix, int depth) {
    for (size_t i = 0; i < nodes.size(); ++i) {
      if (Status s = visit(*nodes[i], prefix + std::to_string(i), depth + 1); !s.ok()) return s;
    }
    return {};
  }

  static void add_parts(const Node& part, bool required, std::vector<Property>& all) {
    const Node* at = &part;
    while (at != nullptr && at->kind() == Node::KIND_REF) at = as<common_chat_schema_ref>(*at).target;
    if (at == nullptr || at->kind() != Node::KIND_OBJECT) return;
    if (all.size() > static_cast<size_t>(kMaxNodes)) return;
    for (const auto& p : as<common_chat_schema_object>(*at).properties) all.push_back({&p, required});
  }

  Status object(const std::vector<Property>& all, const Node* additional, const std::string& name,
                int depth) {
    int64_t optional = additional != nullptr ? 1 : 0, longest = 0, most_equal = 1;
    std::unordered_map<std::string, int64_t> equal;
    for (const Property& p : all) {
      if (!p.required) ++optional;
      longest = std::max(longest, static_cast<int64_t>(name.size() + p.property->name.size()));
      most_equal = std::max(most_equal, ++equal[escaped(p.property->name)]);
    }
    // For each optional property it writes the rules of all behind it, each from a copy of their list.
    const int64_t pairs = optional * optional / 2;
    count_.steps += pairs * optional / 30 + pairs * (most_equal + longest / 8) / 10;
    if (count_.steps > kMaxSteps)
      return refusal(fmt::format("an object has {} optional properties, which are too many", optional));
    count_.rules += 2 * static_cast<int64_t>(all.size()) + optional;
    for (const Property& p : all) {
      if (Status s = visit(*p.property->schema, name + "-" + p.property->name, depth + 1); !s.ok()) return s;
    }
    if (additional == nullptr) return {};
    return additional->kind() == Node::KIND_ANY ? Status()
                                                : visit(*additional, name + "-additional-value", depth + 1);
  }

  static std::string escaped(const std::string& name) {
    std::string out;
    for (const char c : name) {
      const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
      if (plain || c == '-') {
        out += c;
      } else if (out.empty() || out.back() != '\0') {
        out += '\0';
      }
    }
    return out;
  }

  /// Rules of one name get numbers, looked for from 0 on.
  bool charge_name(const std::string& name) {
    ++count_.rules;
    count_.name_bytes += static_cast<int64_t>(name.size());
    count_.steps += 2 * names_[escaped(name)]++;
    return count_.name_bytes <= kMaxNameBytes && count_.steps <= kMaxSteps;
  }

  SchemaWork count_;
  std::unordered_set<std::string> seen_;
  std::unordered_set<const Node*> open_;
  std::unordered_map<std::string, int64_t> names_;
};

}  // namespace

Status check_schema(const common_json& schema) { return JsonWalk(schema).node(schema, 0); }

Status prepare_schema(common_chat_schema_document& document, const SchemaReferences& references,
                      SchemaWork* work) {
  Preparation preparation;
  if (Status s = preparation.node(document.root); !s.ok()) return s;
  for (auto& [name, target] : document.refs) {
    if (Status s = preparation.target(target); !s.ok()) return s;
  }
  preparation.mend_targets();
  Circles circles(references);
  if (Status s = circles.within(*document.root); !s.ok()) return s;
  for (auto& [name, target] : document.refs) {
    if (Status s = circles.within(*target); !s.ok()) return s;
  }
  Work all(work != nullptr ? *work : SchemaWork());
  Status status = all.visit(*document.root, "", 0);
  if (work != nullptr) *work = all.count();
  return status;
}

}  // namespace narrows
