#include "core.h"

#include <pthread.h>

#include <algorithm>
#include <limits>
#include <new>
#include <utility>

#include "check.h"

namespace searchr1 {
namespace {

std::atomic<unsigned> num_forks{0};  // of the processes that this one descends from, since this library was loaded

unsigned current_generation() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { num_forks.fetch_add(1); });
  (void)registered;
  return num_forks.load(std::memory_order_relaxed);
}

}  // namespace

Core::Core(BatcherOptions given)
    : options(std::move(given)), fork_generation(current_generation()), cache(options.max_cache_bytes) {
  clock = std::thread([this] { run_clock(); });
}

Core::~Core() { close(); }

std::shared_ptr<Core> Core::make(BatcherOptions options) {
  return {new Core(std::move(options)), [](Core* core) {
            if (!core->is_forked()) delete core;
          }};
}

bool Core::is_forked() const { return num_forks.load(std::memory_order_relaxed) != fork_generation; }

void Core::check_process() const {
  if (is_forked()) {
    throw UsedAfterFork(
        "this batcher was made before a fork, and its threads are not in this process; make another one here");
  }
}

// ---- a ticket's way in ------------------------------------------------------------------------------------------

void Core::submit(Ticket& ticket, Clock::time_point deadline) {
  Ticket::Parts& parts = *ticket.parts_;
  std::lock_guard lock(mutex);
  parts.id = next_ticket++;
  ++statistics.num_searches;
  if (is_over) {
    parts.error = error;
    settle_locked(ticket, Outcome::failed);
    return;
  }
  if (deadline <= parts.submitted_at) {
    settle_locked(ticket, Outcome::expired);
    return;
  }
  if (deadline != Clock::time_point::max()) {
    parts.deadline = deadlines.emplace(deadline, &ticket);
    parts.has_deadline = true;
    if (parts.deadline == deadlines.begin()) clock_news.notify_one();
  }
  if (blocked.empty() && has_room_locked(parts.cost)) {
    admit_locked(ticket);
  } else {
    ++statistics.num_blocked;
    parts.blocked_place = blocked.insert(blocked.end(), &ticket);
    parts.is_blocked = true;
  }
  parts.is_announced = true;
}

// Whatever is too large for the bound alone is let in alone.
bool Core::has_room_locked(int64_t cost) const {
  return pending_bytes == 0 || pending_bytes + cost <= options.max_pending_bytes;
}

void Core::admit_blocked_locked() {
  while (!blocked.empty() && has_room_locked(blocked.front()->parts_->cost)) {
    Ticket& ticket = *blocked.front();
    blocked.pop_front();
    ticket.parts_->is_blocked = false;
    admit_locked(ticket);
    for (auto* sleeper : ticket.parts_->sleepers) sleeper->notify_all();
  }
}

void Core::admit_locked(Ticket& ticket) {
  Ticket::Parts& parts = *ticket.parts_;
  const size_t size = static_cast<size_t>(parts.num_queries) * static_cast<size_t>(parts.k);
  try {  // to throw from here would end the process in the clock's thread, and leave a dead ticket in the lists
    parts.rows.resize(static_cast<size_t>(parts.num_queries));
    parts.scores.assign(size, -std::numeric_limits<float>::infinity());
    parts.ids.assign(size, -1);
  } catch (const std::bad_alloc&) {
    parts.scores = {};
    parts.error = message("there is no memory for ", parts.num_queries, " results of ", parts.k, " hits");
    settle_locked(ticket, Outcome::failed);
    return;
  }
  parts.is_admitted = true;
  pending_bytes += parts.cost;
  statistics.num_queries += parts.num_queries;
  parts.num_missing = parts.num_queries;
  if (parts.num_queries == 0) settle_locked(ticket, Outcome::done);
  std::vector<std::string> queries = std::move(parts.queries);
  for (int64_t row = 0; row < parts.num_queries; ++row) {
    search_locked(ticket, row, std::move(queries[static_cast<size_t>(row)]));
  }
}

void Core::search_locked(Ticket& ticket, int64_t row, std::string query) {
  Ticket::Parts& parts = *ticket.parts_;
  const Key key{query, parts.depth};
  if (const Hits* hits = cache.find(key)) {
    ++statistics.num_cache_hits;
    answer_locked(ticket, row, *hits, Clock::now());
    return;
  }
  std::shared_ptr<Flight> flight;
  if (auto found = flights.find(key); found != flights.end()) {
    ++statistics.num_coalesced;
    flight = found->second;
  } else {
    ++statistics.num_unique;
    flight = std::make_shared<Flight>(Flight{std::move(query), parts.depth, next_flight++, {}, true, {}});
    auto& queue = queues[flight->depth];
    flight->place = queue.insert(queue.end(), flight);
    flights.emplace(flight->key(), flight);
    if (num_queued++ == 0) work.notify_one();
  }
  auto& place = parts.rows[static_cast<size_t>(row)];
  place.place = flight->waiters.insert(flight->waiters.end(), Waiter{&ticket, row});
  place.flight = std::move(flight);
}

// ---- its way out ------------------------------------------------------------------------------------------------

void Core::answer_locked(Ticket& ticket, int64_t row, const Hits& hits, Clock::time_point now) {
  Ticket::Parts& parts = *ticket.parts_;
  const size_t count = std::min(hits.size(), static_cast<size_t>(parts.k));
  const size_t begin = static_cast<size_t>(row) * static_cast<size_t>(parts.k);
  for (size_t rank = 0; rank < count; ++rank) {
    parts.scores[begin + rank] = hits[rank].score;
    parts.ids[begin + rank] = hits[rank].id;
  }
  const auto latency = std::chrono::duration_cast<std::chrono::nanoseconds>(now - parts.submitted_at).count();
  statistics.latency_nanoseconds.add(static_cast<uint64_t>(std::max<int64_t>(latency, 0)));
  if (--parts.num_missing == 0) settle_locked(ticket, Outcome::done);
}

void Core::settle_locked(Ticket& ticket, Outcome outcome) {
  Ticket::Parts& parts = *ticket.parts_;
  for (auto& row : parts.rows) leave_locked(row);
  parts.rows = {};
  parts.queries = {};
  if (parts.has_deadline) deadlines.erase(parts.deadline);
  if (parts.is_blocked) blocked.erase(parts.blocked_place);
  if (parts.is_admitted) pending_bytes -= parts.cost;
  parts.has_deadline = parts.is_blocked = false;
  statistics.num_failed += outcome == Outcome::failed;
  statistics.num_expired += outcome == Outcome::expired;
  statistics.num_cancelled += outcome == Outcome::cancelled;
  parts.outcome.store(outcome, std::memory_order_release);
  if (parts.channel && parts.is_announced) parts.channel->push(parts.id);
  for (auto* sleeper : parts.sleepers) sleeper->notify_all();
}

// A query that nobody waits for any more is not searched, unless it is in a batch already.
void Core::leave_locked(Ticket::Parts::Row& row) {
  if (!row.flight) return;
  Flight& flight = *row.flight;
  flight.waiters.erase(row.place);
  if (flight.waiters.empty() && flight.is_queued) {
    auto queue = queues.find(flight.depth);
    flights.erase(flight.key());
    queue->second.erase(flight.place);
    if (queue->second.empty()) queues.erase(queue);
    --num_queued;
  }
  row.flight.reset();
}

void Core::abandon(Ticket& ticket) {
  std::lock_guard lock(mutex);
  if (ticket.parts_->outcome.load(std::memory_order_relaxed) != Outcome::pending) return;
  settle_locked(ticket, Outcome::cancelled);
  admit_blocked_locked();
}

void Core::expire_locked(Clock::time_point now) {
  while (!deadlines.empty() && deadlines.begin()->first <= now) {
    settle_locked(*deadlines.begin()->second, Outcome::expired);
  }
}

void Core::run_clock() {
  std::unique_lock lock(mutex);
  while (!is_over) {
    if (deadlines.empty()) {
      clock_news.wait(lock);
    } else {
      const Clock::time_point next = deadlines.begin()->first;  // a copy: the entry may go while this waits
      clock_news.wait_until(lock, next);
    }
    expire_locked(Clock::now());
    admit_blocked_locked();
  }
}

bool Core::wait(Ticket::Parts& parts, Clock::duration patience, bool for_admission) {
  const auto is_reached = [&] {
    return parts.outcome.load(std::memory_order_acquire) != Outcome::pending || (for_admission && parts.is_admitted);
  };
  std::unique_lock lock(mutex);
  if (is_reached()) return true;
  std::condition_variable news;
  parts.sleepers.push_back(&news);
  const bool reached = news.wait_for(lock, patience, is_reached);
  parts.sleepers.erase(std::find(parts.sleepers.begin(), parts.sleepers.end(), &news));
  return reached;
}

// ---- batches ----------------------------------------------------------------------------------------------------

std::vector<std::shared_ptr<Flight>> Core::take(Clock::duration patience) {
  const Clock::time_point until = Clock::now() + patience;
  const auto is_ready = [&] {
    return is_over || (num_queued > 0 && batches_in_flight < options.max_batches_in_flight);
  };
  std::unique_lock lock(mutex);
  while (work.wait_until(lock, until, is_ready) && !is_over) {
    expire_locked(Clock::now());
    admit_blocked_locked();
    if (num_queued > 0) return form_batch_locked();
  }
  return {};
}

// From the queue whose first has waited longest.
std::vector<std::shared_ptr<Flight>> Core::form_batch_locked() {
  auto oldest = std::min_element(queues.begin(), queues.end(), [](const auto& a, const auto& b) {
    return a.second.front()->sequence < b.second.front()->sequence;
  });
  auto& queue = oldest->second;
  std::vector<std::shared_ptr<Flight>> batch;
  int64_t num_bytes = 0;
  while (!queue.empty() && static_cast<int64_t>(batch.size()) < options.max_batch_rows) {
    num_bytes += static_cast<int64_t>(queue.front()->query.size());
    if (!batch.empty() && num_bytes > options.max_batch_bytes) break;
    batch.push_back(std::move(queue.front()));
    batch.back()->is_queued = false;
    queue.pop_front();
  }
  if (queue.empty()) queues.erase(oldest);
  num_queued -= static_cast<int64_t>(batch.size());
  ++batches_in_flight;
  ++statistics.num_batches;
  statistics.batch_rows.add(batch.size());
  if (num_queued > 0) work.notify_one();
  return batch;
}

void Core::complete(const std::vector<std::shared_ptr<Flight>>& batch, std::vector<Hits> hits,
                    Clock::time_point taken_at) {
  std::lock_guard lock(mutex);
  const Clock::time_point now = Clock::now();
  --batches_in_flight;
  work.notify_one();
  statistics.batch_nanoseconds.add(static_cast<uint64_t>((now - taken_at) / std::chrono::nanoseconds(1)));
  if (is_over) return;  // everybody was told
  expire_locked(now);
  for (size_t index = 0; index < batch.size(); ++index) {
    Flight& flight = *batch[index];
    flights.erase(flight.key());
    while (!flight.waiters.empty()) {
      const Waiter waiter = flight.waiters.front();
      flight.waiters.pop_front();
      waiter.ticket->parts_->rows[static_cast<size_t>(waiter.row)].flight.reset();
      answer_locked(*waiter.ticket, waiter.row, hits[index], now);
    }
    cache.insert(flight.key(), std::move(hits[index]));
  }
  admit_blocked_locked();
}

// ---- the end ----------------------------------------------------------------------------------------------------

void Core::fail(const std::string& message) {
  std::lock_guard lock(mutex);
  end_locked(message);
}

void Core::end_locked(const std::string& message) {
  if (is_over) return;
  is_over = true;
  error = message;
  const auto fail_ticket = [&](Ticket& ticket) {
    ticket.parts_->error = message;
    settle_locked(ticket, Outcome::failed);
  };
  while (!blocked.empty()) fail_ticket(*blocked.front());
  // A flight that loses its last waiter leaves the table, if it is queued.
  std::vector<std::shared_ptr<Flight>> under_way;
  for (const auto& entry : flights) under_way.push_back(entry.second);
  for (const auto& flight : under_way) {
    while (!flight->waiters.empty()) fail_ticket(*flight->waiters.front().ticket);
  }
  flights.clear();
  work.notify_all();
  clock_news.notify_all();
}

void Core::close() {
  fail("the batcher is closed");
  std::lock_guard lock(closing);
  if (clock.joinable()) clock.join();
}

}  // namespace searchr1
