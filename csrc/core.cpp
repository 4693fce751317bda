#include "core.h"

#include <pthread.h>

#include <algorithm>
#include <limits>
#include <new>
#include <utility>

#include "check.h"

namespace searchr1 {
namespace {

constexpr size_t kAnswersAtOnce = 64;  // flights of a batch answered before the mutex is released for a moment

std::atomic<unsigned> num_forks{0};  // from the process that loaded this library down to this one

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
  if (parts.channel) parts.channel->expect();
  std::lock_guard lock(mutex);
  parts.id = next_ticket++;  // from here on nothing is thrown: lists may hold the ticket
  ++statistics.num_searches;
  try {
    begin_locked(ticket, deadline);
  } catch (const std::bad_alloc&) {
    fail_for_memory_locked(ticket);
  }
  if (!parts.channel) return;
  if (parts.outcome.load(std::memory_order_relaxed) == Outcome::pending) {
    parts.is_announced = true;
  } else {
    parts.channel->expect_no_longer();  // the caller sees that it is settled
  }
}

void Core::begin_locked(Ticket& ticket, Clock::time_point deadline) {
  Ticket::Parts& parts = *ticket.parts_;
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
    admit_locked(ticket, parts.submitted_at);
  } else {
    ++statistics.num_blocked;
    parts.blocked_place = blocked.insert(blocked.end(), &ticket);
    parts.is_blocked = true;
  }
}

// A ticket that exceeds the bound by itself is admitted when nothing else is pending.
bool Core::has_room_locked(int64_t cost) const {
  return pending_bytes == 0 || pending_bytes + cost <= options.max_pending_bytes;
}

void Core::admit_blocked_locked() {
  while (!blocked.empty() && has_room_locked(blocked.front()->parts_->cost)) {
    Ticket& ticket = *blocked.front();
    blocked.pop_front();
    ticket.parts_->is_blocked = false;
    // Before admission, after which the ticket may be settled and gone; a woken thread waits for the mutex anyway.
    for (auto* sleeper : ticket.parts_->sleepers) sleeper->notify_all();
    admit_locked(ticket, Clock::now());
  }
}

void Core::admit_locked(Ticket& ticket, Clock::time_point now) {
  Ticket::Parts& parts = *ticket.parts_;
  const int64_t num_queries = parts.num_queries;
  const size_t size = static_cast<size_t>(num_queries) * static_cast<size_t>(parts.k);
  try {  // a throw from here would end the process in the clock's thread, and leave a dead ticket in the lists
    parts.rows.resize(static_cast<size_t>(num_queries));
    parts.scores.assign(size, -std::numeric_limits<float>::infinity());
    parts.ids.assign(size, -1);
    parts.is_admitted = true;
    pending_bytes += parts.cost;
    parts.num_missing = num_queries;
    std::vector<std::string> queries = std::move(parts.queries);
    if (num_queries == 0) settle_locked(ticket, Outcome::done);
    for (int64_t row = 0; row < num_queries; ++row) {  // the last may settle it
      search_locked(ticket, row, std::move(queries[static_cast<size_t>(row)]), now);
    }
  } catch (const std::bad_alloc&) {
    fail_for_memory_locked(ticket);
  }
}

void Core::fail_for_memory_locked(Ticket& ticket) {
  Ticket::Parts& parts = *ticket.parts_;
  parts.scores = {};
  try {
    const auto text = message("there is no memory for ", parts.num_queries, " results of ", parts.k, " hits");
    parts.error = std::make_shared<const std::string>(text);
  } catch (const std::bad_alloc&) {
    parts.error = no_memory;
  }
  settle_locked(ticket, Outcome::failed);
}

void Core::search_locked(Ticket& ticket, int64_t row, std::string query, Clock::time_point now) {
  Ticket::Parts& parts = *ticket.parts_;
  const Key key{query, parts.depth};
  if (const Hits* hits = cache.find(key)) {
    ++statistics.num_queries;
    ++statistics.num_cache_hits;
    answer_locked(ticket, row, *hits, now);
    return;
  }
  const auto found = flights.find(key);
  const bool is_new = found == flights.end();
  std::shared_ptr<Flight> flight = is_new ? std::make_shared<Flight>() : found->second;
  const auto waiter = flight->waiters.insert(flight->waiters.end(), Waiter{&ticket, row});
  if (is_new) {
    flight->query = std::move(query);
    flight->depth = parts.depth;
    queue_locked(flight);
  }
  ++statistics.num_queries;
  ++(is_new ? statistics.num_unique : statistics.num_coalesced);
  auto& place = parts.rows[static_cast<size_t>(row)];
  place.place = waiter;
  place.flight = std::move(flight);
}

// Does all of it or, if there is no memory, nothing.
void Core::queue_locked(const std::shared_ptr<Flight>& flight) {
  std::list<std::shared_ptr<Flight>> one{flight};
  auto& queue = queues[flight->depth];
  try {
    flights.emplace(flight->key(), flight);
  } catch (const std::bad_alloc&) {
    if (queue.empty()) queues.erase(flight->depth);
    throw;
  }
  flight->sequence = next_flight++;
  flight->is_queued = true;
  flight->place = one.begin();
  queue.splice(queue.end(), one);
  if (num_queued++ == 0) work.notify_one();
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
  for (auto* sleeper : parts.sleepers) sleeper->notify_all();  // they cannot look until the mutex is free
  const std::shared_ptr<Channel> channel = parts.is_announced ? parts.channel : nullptr;
  const uint64_t id = parts.id;
  parts.outcome.store(outcome, std::memory_order_release);  // from here on the ticket may be gone
  if (channel) channel->push(id);
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
  // A settled ticket is left alone, so that dropping thousands of them does not wait for the mutex.
  if (ticket.parts_->outcome.load(std::memory_order_acquire) != Outcome::pending) return;
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

// Takes from the queue whose first entry has waited longest.
std::vector<std::shared_ptr<Flight>> Core::form_batch_locked() {
  auto oldest = std::min_element(queues.begin(), queues.end(), [](const auto& a, const auto& b) {
    return a.second.front()->sequence < b.second.front()->sequence;
  });
  auto& queue = oldest->second;
  std::vector<std::shared_ptr<Flight>> batch;
  batch.reserve(std::min(queue.size(), static_cast<size_t>(options.max_batch_rows)));  // before any change
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
  std::unique_lock lock(mutex);
  const Clock::time_point now = Clock::now();
  --batches_in_flight;
  work.notify_one();
  statistics.batch_nanoseconds.add(static_cast<uint64_t>((now - taken_at) / std::chrono::nanoseconds(1)));
  for (size_t index = 0; index < batch.size() && !is_over; ++index) {  // over: every ticket has failed already
    if (index % kAnswersAtOnce == 0) {
      if (index > 0) {  // lets submitters in meanwhile; what is not answered yet can still be joined
        lock.unlock();
        lock.lock();
        if (is_over) return;
      }
      expire_locked(Clock::now());
    }
    answer_flight_locked(*batch[index], std::move(hits[index]), now);
  }
  admit_blocked_locked();
}

void Core::answer_flight_locked(Flight& flight, Hits hits, Clock::time_point now) {
  while (!flight.waiters.empty()) {
    const Waiter waiter = flight.waiters.front();
    flight.waiters.pop_front();
    waiter.ticket->parts_->rows[static_cast<size_t>(waiter.row)].flight.reset();
    answer_locked(*waiter.ticket, waiter.row, hits, now);
  }
  flights.erase(flight.key());
  cache.insert(flight.key(), std::move(hits));
}

// ---- the end ----------------------------------------------------------------------------------------------------

void Core::fail(const std::string& text) {
  std::shared_ptr<const std::string> message = no_memory;
  try {
    message = std::make_shared<const std::string>(text);
  } catch (const std::bad_alloc&) {  // waiting callers must be told, if not why
  }
  std::lock_guard lock(mutex);
  end_locked(std::move(message));
}

void Core::end_locked(std::shared_ptr<const std::string> message) {
  if (is_over) return;
  is_over = true;
  error = std::move(message);
  const auto fail_ticket = [&](Ticket& ticket) {
    ticket.parts_->error = error;
    settle_locked(ticket, Outcome::failed);
  };
  while (!blocked.empty()) fail_ticket(*blocked.front());
  while (!flights.empty()) {
    const std::shared_ptr<Flight> flight = flights.begin()->second;
    while (!flight->waiters.empty()) fail_ticket(*flight->waiters.front().ticket);
    flights.erase(flight->key());  // a queued one is gone already
  }
  work.notify_all();
  clock_news.notify_all();
}

void Core::close() {
  fail("the batcher is closed");
  std::lock_guard lock(closing);
  if (clock.joinable()) clock.join();
}

}  // namespace searchr1
