// The state that the batcher's handles share, behind one mutex, and its every transition.
//
//   Ticket --waits for--> Flight (one distinct query in flight) --queued--> Batch --> hits --> cache and tickets
//
// Functions that end in `_locked` are called with the mutex held.
#pragma once

#include <atomic>
#include <condition_variable>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "batcher.h"

namespace searchr1 {

// One row of a ticket, in the list of the flight that will answer it.
struct Waiter {
  Ticket* ticket;
  int64_t row;
};

struct Flight {
  std::string query;
  int32_t depth = 0;
  uint64_t sequence = 0;      // first come, first served
  std::list<Waiter> waiters;  // empty: no ticket wants it any more
  bool is_queued = false;
  std::list<std::shared_ptr<Flight>>::iterator place;  // in its queue
  Key key() const { return {query, depth}; }
};

struct Ticket::Parts {
  struct Row {
    std::shared_ptr<Flight> flight;  // null: the row has its hits, or needed no flight
    std::list<Waiter>::iterator place;
  };
  uint64_t id;
  int32_t k;
  int32_t depth;
  int64_t num_queries;
  int64_t cost;  // bytes counted against max_pending_bytes
  Clock::time_point submitted_at;
  std::shared_ptr<Channel> channel;
  // Written last: a thread that sees it settled may read the results, and destroy the ticket.
  std::atomic<Outcome> outcome{Outcome::pending};
  std::shared_ptr<const std::string> error;
  std::vector<float> scores;
  std::vector<int64_t> ids;

  // Guarded by the mutex, and meaningless once the ticket has settled.
  std::vector<std::string> queries;  // until it is admitted
  std::vector<Row> rows;
  int64_t num_missing = 0;
  bool is_admitted = false;
  bool is_announced = false;  // the channel must hear when it settles: submit has returned
  bool has_deadline = false;
  std::multimap<Clock::time_point, Ticket*>::iterator deadline;
  bool is_blocked = false;
  std::list<Ticket*>::iterator blocked_place;
  std::vector<std::condition_variable*> sleepers;  // on the stacks of waiting threads
};

struct Core {
  explicit Core(BatcherOptions options);
  ~Core();

  // A forked child can neither destroy a condition variable (which waits for sleepers that do not exist there) nor lock
  // a mutex (its holder does not exist there), so it leaks what it inherited.
  static std::shared_ptr<Core> make(BatcherOptions options);
  bool is_forked() const;
  void check_process() const;

  void submit(Ticket& ticket, Clock::time_point deadline);
  void abandon(Ticket& ticket);
  std::vector<std::shared_ptr<Flight>> take(Clock::duration patience);
  void complete(const std::vector<std::shared_ptr<Flight>>& batch, std::vector<Hits> hits, Clock::time_point taken_at);
  void fail(const std::string& text);
  void close();
  bool wait(Ticket::Parts& parts, Clock::duration patience, bool for_admission);

  void begin_locked(Ticket& ticket, Clock::time_point deadline);
  void admit_locked(Ticket& ticket, Clock::time_point now);
  void admit_blocked_locked();
  void fail_for_memory_locked(Ticket& ticket);
  void search_locked(Ticket& ticket, int64_t row, std::string query, Clock::time_point now);
  void queue_locked(const std::shared_ptr<Flight>& flight);
  void answer_flight_locked(Flight& flight, Hits hits, Clock::time_point now);
  void answer_locked(Ticket& ticket, int64_t row, const Hits& hits, Clock::time_point now);
  void settle_locked(Ticket& ticket, Outcome outcome);
  void leave_locked(Ticket::Parts::Row& row);
  void expire_locked(Clock::time_point now);
  void end_locked(std::shared_ptr<const std::string> message);
  std::vector<std::shared_ptr<Flight>> form_batch_locked();
  bool has_room_locked(int64_t cost) const;
  void run_clock();

  const BatcherOptions options;
  const unsigned fork_generation;

  mutable std::mutex mutex;
  std::condition_variable work;        // something queued, a batch came back, or it is over
  std::condition_variable clock_news;  // an earlier deadline, or it is over
  std::unordered_map<Key, std::shared_ptr<Flight>, KeyHash> flights;    // queued or in a batch; keys borrow from them
  std::map<int32_t, std::list<std::shared_ptr<Flight>>> queues;         // by depth; none is empty
  std::multimap<Clock::time_point, Ticket*> deadlines;
  std::list<Ticket*> blocked;  // waiting in line for room
  ResultCache cache;
  Statistics statistics;
  int64_t pending_bytes = 0;
  int64_t num_queued = 0;
  int64_t batches_in_flight = 0;
  uint64_t next_ticket = 0;
  uint64_t next_flight = 0;
  bool is_over = false;  // closed or failed: every ticket fails with `error`
  std::shared_ptr<const std::string> error;
  const std::shared_ptr<const std::string> no_memory = std::make_shared<const std::string>("there is no memory");
  std::thread clock;
  std::mutex closing;  // one close joins the clock, the others wait for it
};

}  // namespace searchr1
