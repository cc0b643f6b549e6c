#include "kv/recurrent/recurrent_marks.h"

#include <algorithm>
#include <new>

namespace narrows {

void RecurrentMarks::begin_prompt() {
  if (marks_.empty()) return;
  const bool has_first = marks_.front().kind == Kind::first;
  if (keeps_first_ && !has_first && marks_.size() > 1) marks_.front().kind = Kind::first;
  marks_.back().kind = marks_.back().kind == Kind::first ? Kind::first : Kind::previous;
  const int64_t newest = last();
  std::erase_if(marks_, [&](const Mark& m) { return m.n != newest && m.kind != Kind::first; });
}

/// Of a kind only `most` stay.
void RecurrentMarks::drop_oldest(Kind kind, int64_t most) {
  const auto is_such = [kind](const Mark& m) { return m.kind == kind; };
  if (std::count_if(marks_.begin(), marks_.end(), is_such) > most)
    marks_.erase(std::find_if(marks_.begin(), marks_.end(), is_such));
}

PageStore& RecurrentMarks::add(int64_t n, Kind kind, const PageStore* from) {
  Mark mark{n, kind, empty_page()};
  if (from != nullptr) {
    mark.state.share(*from, 1);
  } else if (!mark.state.grow_to(1)) {
    throw std::bad_alloc();
  }
  marks_.reserve(marks_.size() + 1);
  drop_oldest(kind, kind == Kind::prompt ? 1 : 0);
  marks_.push_back(std::move(mark));
  return marks_.back().state;
}

const RecurrentMarks::Mark* RecurrentMarks::at(int64_t n) const {
  const auto found = std::find_if(marks_.begin(), marks_.end(), [n](const Mark& m) { return m.n == n; });
  return found != marks_.end() ? &*found : nullptr;
}

void RecurrentMarks::keep(int64_t n) {
  while (last() > n) marks_.pop_back();
}

void RecurrentMarks::share(const RecurrentMarks& from, int64_t n) {
  std::vector<Mark> marks;
  for (const Mark& m : from.marks_) {
    if (m.n > n) break;
    marks.push_back({m.n, m.kind, empty_page()});
    marks.back().state.share(m.state, 1);
  }
  marks_ = std::move(marks);
}

void RecurrentMarks::save(SnapshotWriter& out) const {
  out.number(static_cast<int64_t>(marks_.size()));
  for (const Mark& m : marks_) {
    out.number(m.n);
    out.number(static_cast<int64_t>(m.kind));
    m.state.save(out);
  }
}

bool RecurrentMarks::load(SnapshotReader& in, int64_t n) {
  clear();
  const int64_t n_mark = in.count(0, kMost);
  for (int64_t i = 0; i < n_mark; ++i) {
    Mark m{in.count(last() + 1, n), Kind::prompt, empty_page()};
    m.kind = static_cast<Kind>(in.count(0, static_cast<int64_t>(Kind::step)));
    if (!in.ok() || !m.state.load(in, 1)) return false;
    marks_.push_back(std::move(m));
  }
  return in.ok();
}

int64_t RecurrentMarks::bytes() const { return static_cast<int64_t>(marks_.size()) * state_bytes_; }

}  // namespace narrows
