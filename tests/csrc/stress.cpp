// The batcher under fire, for ThreadSanitizer and AddressSanitizer: producers submit, wait, cancel, expire, drop and
// listen; workers answer, slowly or at once. Every result is checked against what its query must give, every counter
// against what was done, and nothing may be left pending.
//
//   stress [operations] [seed]
#include <poll.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "batcher.h"

using namespace searchr1;
using namespace std::chrono_literals;

// Memory that runs out: while a thread asks for it, every so many allocations of it fail.
thread_local int64_t allocations_until_failure = -1;

void* operator new(size_t size) {
  if (allocations_until_failure >= 0 && allocations_until_failure-- == 0) throw std::bad_alloc();
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

enum class End { well, backend_fails, memory_runs_out };

constexpr int kProducers = 6;
constexpr int kWorkers = 2;

#define REQUIRE(condition)                                                       \
  do {                                                                           \
    if (!(condition)) {                                                          \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                              \
    }                                                                            \
  } while (false)

struct Counts {
  std::atomic<int64_t> submitted{0}, done{0}, failed{0}, expired{0}, cancelled{0};
};

// Query n has n % 7 hits less than asked for, the best of them row n.
int64_t number_of(const std::string& query) { return std::stoll(query.substr(1)); }

void answer(Batch& batch) {
  const int64_t width = batch.depth();
  std::vector<float> scores(static_cast<size_t>(batch.size() * width));
  std::vector<int64_t> ids(scores.size());
  for (int64_t row = 0; row < batch.size(); ++row) {
    const int64_t number = number_of(batch.query(row));
    for (int64_t rank = 0; rank < width; ++rank) {
      const auto place = static_cast<size_t>(row * width + rank);
      scores[place] = static_cast<float>(-rank);
      ids[place] = rank < width - number % 7 ? number + rank : -1;
    }
  }
  batch.complete(scores.data(), ids.data(), width);
}

void check(const Ticket& ticket, const std::vector<std::string>& queries, int32_t min_depth) {
  const int32_t k = ticket.k();
  int32_t depth = min_depth;
  while (depth < k) depth *= 2;
  for (size_t row = 0; row < queries.size(); ++row) {
    const int64_t number = number_of(queries[row]);
    for (int32_t rank = 0; rank < k; ++rank) {
      const int64_t id = ticket.ids()[row * static_cast<size_t>(k) + static_cast<size_t>(rank)];
      REQUIRE(id == (rank < depth - number % 7 ? number + rank : -1));
    }
  }
}

void count(const Ticket& ticket, Counts& counts) {
  switch (ticket.outcome()) {
    case Outcome::done: ++counts.done; break;
    case Outcome::failed: ++counts.failed; break;
    case Outcome::expired: ++counts.expired; break;
    case Outcome::cancelled: ++counts.cancelled; break;
    case Outcome::pending: REQUIRE(!"a settled ticket is pending");
  }
}

struct Open {
  std::shared_ptr<Ticket> ticket;
  std::vector<std::string> queries;
};

void settle_some(std::map<uint64_t, Open>& open, Channel& channel, Counts& counts, int32_t min_depth, int patience_ms) {
  pollfd ready{channel.descriptor(), POLLIN, 0};
  if (poll(&ready, 1, patience_ms) <= 0) return;
  for (uint64_t id : channel.drain()) {
    auto found = open.find(id);
    if (found == open.end()) continue;  // settled before submit returned, or dropped
    const Ticket& ticket = *found->second.ticket;
    if (ticket.outcome() == Outcome::done) check(ticket, found->second.queries, min_depth);
    count(ticket, counts);
    open.erase(found);
  }
}

void produce(Batcher& batcher, int64_t operations, uint64_t seed, int32_t min_depth, Counts& counts) {
  std::mt19937_64 random(seed);
  auto channel = std::make_shared<Channel>();
  std::map<uint64_t, Open> open;
  for (int64_t operation = 0; operation < operations; ++operation) {
    std::vector<std::string> queries(1 + (random() % 16 == 0 ? random() % 40 : 0));
    for (auto& query : queries) query = "q" + std::to_string(random() % (random() % 4 ? 50000 : 50));
    const int32_t k = random() % 32 ? 1 + static_cast<int32_t>(random() % 4) : 9;
    auto deadline = Clock::time_point::max();
    if (random() % 4 == 0) deadline = Clock::now() + std::chrono::microseconds(random() % 3000) - 100us;
    const auto way = random() % 8;
    auto ticket = batcher.submit(queries, k, Clock::now(), deadline, way < 4 ? channel : nullptr);
    ++counts.submitted;
    if (way == 0 || way == 4) ticket->cancel();
    if (way == 5) {  // dropped; what it was by then is known to the batcher alone
      continue;
    }
    if (way < 4 && ticket->outcome() == Outcome::pending) {
      open.emplace(ticket->id(), Open{ticket, std::move(queries)});
      if (open.size() > 64) settle_some(open, *channel, counts, min_depth, 1);
      continue;
    }
    while (!ticket->wait_settled(50ms)) {
    }
    if (ticket->outcome() == Outcome::done) check(*ticket, queries, min_depth);
    count(*ticket, counts);
  }
  while (!open.empty()) settle_some(open, *channel, counts, min_depth, 100);
  REQUIRE(channel->num_expected() == 0);
}

// What Python's worker does: whatever is thrown on the way to an answer ends the batcher.
void work(Batcher& batcher, std::atomic<int64_t>& num_batches, int64_t operations, End end) {
  std::mt19937_64 random(static_cast<uint64_t>(num_batches++));
  while (!batcher.is_finished()) {
    try {
      const int64_t number = num_batches++;
      if (end == End::memory_runs_out && number > operations / 100) {
        allocations_until_failure = static_cast<int64_t>(random() % 4000);
      }
      auto batch = batcher.take(20ms);
      if (batch && number % 64 == 0) std::this_thread::sleep_for(2ms);
      if (batch && end == End::backend_fails && number > operations / 100) {
        batcher.fail("the backend broke");
      } else if (batch) {
        answer(*batch);
      }
      allocations_until_failure = -1;
    } catch (const std::bad_alloc&) {
      allocations_until_failure = -1;
      batcher.fail("memory ran out");
    }
  }
}

void run(int64_t operations, uint64_t seed, End end) {
  BatcherOptions options;
  options.max_pending_bytes = 20000;  // so that there are always some in line
  options.max_cache_bytes = 1 << 20;
  options.max_batch_rows = 64;
  options.min_depth = 8;
  Batcher batcher(options);
  Counts counts;
  std::atomic<int64_t> num_batches{0};
  std::vector<std::thread> workers, producers;
  for (int index = 0; index < kWorkers; ++index) {
    workers.emplace_back([&] { work(batcher, num_batches, operations, end); });
  }
  std::atomic<bool> is_over{false};
  std::thread observer([&] {
    while (!is_over) {
      REQUIRE(batcher.gauges().pending_bytes >= 0);
      REQUIRE(batcher.statistics().num_queries >= 0);
      std::this_thread::sleep_for(5ms);
    }
  });
  for (int index = 0; index < kProducers; ++index) {
    producers.emplace_back([&, index] {
      produce(batcher, operations / kProducers, seed + static_cast<uint64_t>(index), options.min_depth, counts);
    });
  }
  for (auto& producer : producers) producer.join();
  is_over = true;
  observer.join();
  const Statistics statistics = batcher.statistics();
  const Gauges gauges = batcher.gauges();
  REQUIRE(counts.submitted == statistics.num_searches);
  REQUIRE(counts.expired <= statistics.num_expired && counts.cancelled <= statistics.num_cancelled);
  REQUIRE(gauges.pending_bytes == 0 && gauges.queued == 0 && gauges.blocked == 0);
  REQUIRE(statistics.num_queries == statistics.num_unique + statistics.num_coalesced + statistics.num_cache_hits);
  REQUIRE(counts.done > 0);
  if (end != End::well) {
    REQUIRE(counts.failed > 0);
  } else {
    REQUIRE(counts.failed == 0 && counts.expired > 0 && counts.cancelled > 0 && statistics.num_blocked > 0);
  }
  std::thread other([&] { batcher.close(); });
  batcher.close();
  other.join();
  for (auto& worker : workers) worker.join();
  REQUIRE(batcher.submit({"q1"}, 1, Clock::now(), Clock::time_point::max())->outcome() == Outcome::failed);
  std::cout << counts.submitted << " submits: " << counts.done << " done, " << counts.failed << " failed, "
            << statistics.num_expired << " expired, " << statistics.num_cancelled << " cancelled or dropped; "
            << statistics.num_unique << " of " << statistics.num_queries << " queries searched, in "
            << statistics.num_batches << " batches" << std::endl;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t operations = argc > 1 ? std::atoll(argv[1]) : 100000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  run(operations, seed, End::well);
  run(operations / 10, seed + 1000, End::backend_fails);
  run(operations / 10, seed + 2000, End::memory_runs_out);
  return 0;
}
