#include "batcher.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <utility>

#include "check.h"
#include "core.h"

namespace searchr1 {
namespace {

std::string read_file(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  CHECK_INPUT(file != nullptr, "cannot read ", path, ": ", std::strerror(errno));
  std::string bytes;
  char part[1 << 16];
  size_t count;
  while ((count = std::fread(part, 1, sizeof part, file)) > 0) bytes.append(part, count);
  const bool is_read = std::ferror(file) == 0;
  const int reason = errno;
  std::fclose(file);
  CHECK_INPUT(is_read, "cannot read ", path, ": ", std::strerror(reason));
  return bytes;
}

constexpr int32_t kLargestK = 1 << 20;

// With libstdc++ and glibc: a flight 128, its list nodes 96, hash node and bucket 80, its row in the ticket 24.
constexpr int64_t kQueryOverhead = 328;

int32_t depth_for(int32_t k, int32_t min_depth) {
  int32_t depth = min_depth;
  while (depth < k) depth *= 2;
  return depth;
}

// The hits of one row, up to the first id -1. Throws if the row is not a valid result of a search.
Hits read_row(const std::string& query, const float* scores, const int64_t* ids, int64_t width) {
  Hits hits;
  hits.reserve(static_cast<size_t>(width));
  for (int64_t rank = 0; rank < width; ++rank) {
    const bool is_hit = ids[rank] >= 0;
    CHECK_INPUT(ids[rank] >= -1, "the backend gave the row ", ids[rank], " for the query '", query, "'");
    CHECK_INPUT(!is_hit || static_cast<int64_t>(hits.size()) == rank,
                "the backend gave a hit after the end (id -1) of the hits of '", query, "'");
    if (!is_hit) continue;
    CHECK_INPUT(!std::isnan(scores[rank]), "the backend gave a score that is NaN for the query '", query, "'");
    CHECK_INPUT(hits.empty() || hits.back().score >= scores[rank], "the backend gave hits of '", query,
                "' that are not ordered by score");
    hits.push_back({scores[rank], ids[rank]});
  }
  return hits;
}

}  // namespace

// ---- Ticket -----------------------------------------------------------------------------------------------------

Ticket::Ticket(std::shared_ptr<Core> core, std::vector<std::string> queries, int32_t k, Clock::time_point now,
               Clock::time_point deadline, std::shared_ptr<Channel> channel)
    : core_(std::move(core)), parts_(new Parts) {
  parts_->k = k;
  parts_->depth = depth_for(k, core_->options.min_depth);
  parts_->num_queries = static_cast<int64_t>(queries.size());
  parts_->cost = parts_->num_queries * (kQueryOverhead + k * static_cast<int64_t>(sizeof(float) + sizeof(int64_t)));
  for (const std::string& query : queries) parts_->cost += static_cast<int64_t>(query.size());
  parts_->queries = std::move(queries);
  parts_->channel = std::move(channel);
  parts_->submitted_at = now;
  core_->submit(*this, deadline);
}

Ticket::~Ticket() {
  if (core_->is_forked()) {
    parts_.release();  // leaked: what it points into cannot be destroyed here
  } else {
    core_->abandon(*this);
  }
}

uint64_t Ticket::id() const { return parts_->id; }
int64_t Ticket::num_queries() const { return parts_->num_queries; }
int32_t Ticket::k() const { return parts_->k; }
Outcome Ticket::outcome() const { return parts_->outcome.load(std::memory_order_acquire); }

std::string Ticket::error() const { return outcome() == Outcome::failed ? *parts_->error : std::string(); }

bool Ticket::wait_admitted(Clock::duration patience) const {
  core_->check_process();
  return core_->wait(*parts_, patience, true);
}

bool Ticket::wait_settled(Clock::duration patience) const {
  core_->check_process();
  return outcome() != Outcome::pending || core_->wait(*parts_, patience, false);
}

void Ticket::cancel() {
  core_->check_process();
  core_->abandon(*this);
}

const std::vector<float>& Ticket::scores() const {
  CHECK_INPUT(outcome() == Outcome::done, "the ticket has no result: it is not done");
  return parts_->scores;
}

const std::vector<int64_t>& Ticket::ids() const {
  CHECK_INPUT(outcome() == Outcome::done, "the ticket has no result: it is not done");
  return parts_->ids;
}

// ---- Batch ------------------------------------------------------------------------------------------------------

Batch::Batch(std::shared_ptr<Core> core, std::vector<std::shared_ptr<Flight>> flights, int32_t depth)
    : core_(std::move(core)), flights_(std::move(flights)), depth_(depth), taken_at_(Clock::now()) {}

Batch::~Batch() {
  if (!is_answered_ && !core_->is_forked()) {
    core_->fail(message("a batch of ", size(), " queries was dropped without an answer"));
  }
}

const std::string& Batch::query(int64_t row) const { return flights_.at(static_cast<size_t>(row))->query; }

void Batch::complete(const float* scores, const int64_t* ids, int64_t width) {
  core_->check_process();
  CHECK_INPUT(!is_answered_, "the batch is answered already");
  CHECK_INPUT(width >= 1 && width <= depth_, "the backend gave ", width, " hits a query; asked for were ", depth_);
  std::vector<Hits> hits;
  hits.reserve(flights_.size());
  for (int64_t row = 0; row < size(); ++row) {
    hits.push_back(read_row(query(row), scores + row * width, ids + row * width, width));
  }
  core_->complete(flights_, std::move(hits), taken_at_);
  is_answered_ = true;  // only now: if that threw, dropping the batch fails everything
}

// ---- Batcher ----------------------------------------------------------------------------------------------------

Batcher::Batcher(BatcherOptions options) {
  CHECK_INPUT(options.max_batch_rows >= 1, "max_batch_rows must be at least 1, not ", options.max_batch_rows);
  CHECK_INPUT(options.max_batch_bytes >= 1, "max_batch_bytes must be at least 1, not ", options.max_batch_bytes);
  CHECK_INPUT(options.max_pending_bytes >= 1, "max_pending_bytes must be at least 1, not ", options.max_pending_bytes);
  CHECK_INPUT(options.max_cache_bytes >= 0, "max_cache_bytes must be at least 0, not ", options.max_cache_bytes);
  CHECK_INPUT(options.min_depth >= 1 && options.min_depth <= kLargestK, "min_depth must be between 1 and ", kLargestK,
              ", not ", options.min_depth);
  CHECK_INPUT(options.max_batches_in_flight >= 1, "max_batches_in_flight must be at least 1, not ",
              options.max_batches_in_flight);
  core_ = Core::make(std::move(options));
}

Batcher::~Batcher() {
  if (!core_->is_forked()) core_->close();
}

std::shared_ptr<Ticket> Batcher::submit(std::vector<std::string> queries, int64_t k, Clock::time_point now,
                                        Clock::time_point deadline, std::shared_ptr<Channel> channel) {
  core_->check_process();
  CHECK_INPUT(k >= 1 && k <= kLargestK, "k is the number of hits a query gets, between 1 and ", kLargestK, ", not ", k);
  const auto narrow_k = static_cast<int32_t>(k);
  return std::make_shared<Ticket>(core_, std::move(queries), narrow_k, now, deadline, std::move(channel));
}

std::shared_ptr<Batch> Batcher::take(Clock::duration patience) {
  core_->check_process();
  std::vector<std::shared_ptr<Flight>> flights = core_->take(patience);
  if (flights.empty()) return nullptr;
  const int32_t depth = flights.front()->depth;
  try {
    return std::make_shared<Batch>(core_, std::move(flights), depth);
  } catch (const std::bad_alloc&) {  // the flights are in no queue any more
    core_->fail("there is no memory for a batch");
    throw;
  }
}

bool Batcher::is_finished() const {
  core_->check_process();
  std::lock_guard lock(core_->mutex);
  return core_->is_over;
}

void Batcher::fail(const std::string& error) {
  core_->check_process();
  core_->fail(error);
}

void Batcher::close() {
  if (!core_->is_forked()) core_->close();  // a child has nothing to close, but its interpreter calls this at exit
}

Statistics Batcher::statistics(bool reset) {
  core_->check_process();
  std::lock_guard lock(core_->mutex);
  Statistics statistics = core_->statistics;
  if (reset) core_->statistics = Statistics();
  return statistics;
}

Gauges Batcher::gauges() const {
  core_->check_process();
  std::lock_guard lock(core_->mutex);
  Gauges gauges;
  gauges.queued = core_->num_queued;
  gauges.blocked = static_cast<int64_t>(core_->blocked.size());
  gauges.pending_bytes = core_->pending_bytes;
  gauges.batches_in_flight = core_->batches_in_flight;
  gauges.cache_entries = core_->cache.size();
  gauges.cache_bytes = core_->cache.num_bytes();
  gauges.cache_evicted = core_->cache.num_evicted();
  return gauges;
}

void Batcher::save_cache(const std::string& path) const {
  core_->check_process();
  std::string bytes;
  {
    std::lock_guard lock(core_->mutex);
    bytes = core_->cache.serialize(core_->options.identity);
  }
  const std::string temporary = message(path, ".", getpid(), ".tmp");
  std::FILE* file = std::fopen(temporary.c_str(), "wb");
  CHECK_INPUT(file != nullptr, "cannot write ", temporary, ": ", std::strerror(errno));
  const bool is_written = std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size() && std::fflush(file) == 0 &&
                          fsync(fileno(file)) == 0;
  const int reason = errno;
  const bool is_closed = std::fclose(file) == 0;
  if (!is_written || !is_closed || std::rename(temporary.c_str(), path.c_str()) != 0) {
    const int cause = is_written ? errno : reason;
    std::remove(temporary.c_str());
    throw std::runtime_error(message("cannot write ", path, ": ", std::strerror(cause)));
  }
}

int64_t Batcher::load_cache(const std::string& path) {
  core_->check_process();
  auto entries = ResultCache::deserialize(read_file(path), core_->options.identity, path);
  std::lock_guard lock(core_->mutex);
  for (auto& entry : entries) core_->cache.insert({entry.query, entry.depth}, std::move(entry.hits));
  return static_cast<int64_t>(entries.size());
}

}  // namespace searchr1
