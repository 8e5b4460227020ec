"""Lua scripts: what must happen in Redis at once or not at all, and the names of all keys.

urm:events                    stream of accepted events; an entry is deleted when its result is stored, so its
                              length is the backlog
urm:events:dead               events given up, each with the reason
urm:event:{n}:{user}:{id}     hash: marks an accepted event, so that a retry is not processed again, and holds its
                              lineage for a day (below); n is the length of the user's id, so that no two share a key
urm:backlog:{user}            sorted set: the user's entries in the stream by their milliseconds; for coalescing, and to
                              bound what waits per user
urm:history:{user}            sorted set: event_id by time in microseconds, newest `history_events` kept
urm:history_events:{user}     hash: `e:` and event_id → the event; `revision` counts its events so far, `batch`
                              names the batch that changed it last
urm:result:{user}:{task}      hash: body (JSON) and the three numbers that order results; `choice` tells by which
                              `recall.k` and `recall.filters` its items were chosen, absent for the defaults
urm:control                   a user with whom a worker has succeeded lately; answered again where an event fails
urm:backfill:{order}          hash: by shard of a back-fill of that publication, how far it is (JSON)
urm:forgotten                 sorted set: digests of erased users, whom no back-fill brings back, by the instant
urm:adhoc                     list of ad-hoc requests that wait, each behind its deadline
urm:adhoc:workers             sorted set: ad-hoc workers by the instant from which they count as gone
urm:adhoc:answer:{id}         list with the one answer to an ad-hoc request

Users and event ids may be any text, so they stand last in a name, or before a task, which has no colon.

Fields of the lineage:

    entry, user                       the stream entry of the event, whose id holds the time of acceptance, and its user
    digest                            of what the client sent; none once it was replayed from the dead letters
    done, batch, release, revision    when it was finished, in which batch (worker and number, as in the worker's log),
                                      with which release, and the revision of the history whose results include it
    dead                              when it became a dead letter
"""

STREAM = "urm:events"
DEAD_STREAM = "urm:events:dead"
GROUP = "recall"
# A client may retry for this long, and an event be traced; an id seen again later counts as new to the stream, and the
# user's history still knows it.
MARK_TTL_SECONDS = 86_400
CONTROL = "urm:control"
FORGOTTEN = "urm:forgotten"
AD_HOC_REQUESTS = "urm:adhoc"
AD_HOC_WORKERS = "urm:adhoc:workers"


def accepted_key(user_id: str, event_id: str) -> str:
    """Key that marks an event of a user as accepted and holds its lineage."""
    return f"urm:event:{len(user_id)}:{user_id}:{event_id}"


def waiting_key(user_id: str) -> str:
    """Key of a user's unfinished entries."""
    return f"urm:backlog:{user_id}"


def history_keys(user_id: str) -> tuple[str, str]:
    """Keys of a user's recent events: their order, their content."""
    return f"urm:history:{user_id}", f"urm:history_events:{user_id}"


def result_key(user_id: str, task: str) -> str:
    """Key of a stored result."""
    return f"urm:result:{user_id}:{task}"


def backfill_key(order: int) -> str:
    """Key of the progress of the back-fill of a publication."""
    return f"urm:backfill:{order}"


def ad_hoc_answer_key(request_id: str) -> str:
    """Key of the answer to an ad-hoc request."""
    return f"urm:adhoc:answer:{request_id}"


# Accept one event: 1 accepted, 0 seen before, -1 the stream is full, -2 too much waits of this user, -3 its id was
# seen with another content.
# KEYS: stream, mark, waiting.
# ARGV: event JSON, accepted_at (seconds), mark's TTL, longest stream, user, traceparent or '', version of the event's
# form, most entries per user, digest of the content.
ACCEPT = """
local digest = ARGV[9]
if redis.call('EXISTS', KEYS[2]) == 1 then
    local seen = redis.call('HGET', KEYS[2], 'digest')
    return seen and seen ~= digest and -3 or 0
end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[4]) then return -1 end
if redis.call('ZCARD', KEYS[3]) >= tonumber(ARGV[8]) then return -2 end
local fields = {'event', ARGV[1], 'accepted_at', ARGV[2], 'version', ARGV[7]}
if ARGV[6] ~= '' then
    fields[7], fields[8] = 'traceparent', ARGV[6]
end
local entry = redis.call('XADD', KEYS[1], '*', unpack(fields))
redis.call('HSET', KEYS[2], 'entry', entry, 'user', ARGV[5], 'digest', digest)
redis.call('EXPIRE', KEYS[2], ARGV[3])
redis.call('ZADD', KEYS[3], string.match(entry, '%d+'), entry)
redis.call('EXPIRE', KEYS[3], ARGV[3])
return 1
"""

# Remember a user with whom inference has worked, unless nothing is known of him any more: an erasure came first.
# KEYS: control, history.
# ARGV: user, TTL.
NOTE_CONTROL = """
if redis.call('EXISTS', KEYS[2]) == 1 then redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2]) end
"""

# Part of the scripts that store results: one stays if it is newer by (event time, revision, order of the release). The
# release comes last: what knows more of the user must not give way to a newer release that knows less (ADR 11).
# `before` is what the key held before the first write of the script.
_STORE_RESULT = """
local function read_numbers(key) return redis.call('HMGET', key, 'event_ts_us', 'revision', 'release_order') end
local function is_newer(before, numbers)
    for rank = 1, 3 do
        local old, new = tonumber(before[rank]), tonumber(numbers[rank])
        if old == nil or new > old then return true end
        if new < old then return false end
    end
    return true
end
local function store_result(key, before, numbers, choice, body, ttl)
    if not is_newer(before, numbers) then return 0 end
    redis.call('HSET', key, 'event_ts_us', numbers[1], 'revision', numbers[2], 'release_order', numbers[3],
        'body', body)
    if choice == '' then redis.call('HDEL', key, 'choice') else redis.call('HSET', key, 'choice', choice) end
    redis.call('EXPIRE', key, ttl)
    return 1
end
"""

# Finish a user's entries, all at once: their events into the recent history, the results stored, the entries out of
# the stream, the lineage noted. Nothing happens if something has changed since the results were computed: the history,
# by another worker or by a Redis that lost its newest writes; or an entry, which was finished or given up elsewhere. So
# a result knows exactly the history of its revision, and what is given up never comes into a history.
# Returns -1 if nothing happened, else the number of results stored.
# KEYS: stream, history (order, content), waiting, then a mark per entry, then a result per task.
# ARGV: group, batch that changed the history last ('' if none), this batch, events kept, history's TTL, results' TTL,
# release, its order, instant, newest event's microseconds, number of entries, choice, then per entry its id, event_id,
# time in microseconds and event JSON, then a body per task.
COMMIT = (
    _STORE_RESULT
    + """
local stream, order, content, waiting = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local entries, first = tonumber(ARGV[11]), 13
-- Every key is read before the first write: one of another kind fails here, and nothing has happened.
redis.call('ZCARD', order)
local before = {}
for task = 1, #KEYS - 4 - entries do
    before[task] = read_numbers(KEYS[4 + entries + task])
end
if (redis.call('HGET', content, 'batch') or '') ~= ARGV[2] then return -1 end
for at = first, first + 4 * entries - 1, 4 do
    if #redis.call('XRANGE', stream, ARGV[at], ARGV[at]) == 0 then return -1 end
end

local added = 0
for at = first, first + 4 * entries - 1, 4 do
    if redis.call('HSETNX', content, 'e:' .. ARGV[at + 1], ARGV[at + 3]) == 1 then
        redis.call('ZADD', order, ARGV[at + 2], ARGV[at + 1])
        added = added + 1
    end
end
local revision = redis.call('HINCRBY', content, 'revision', added)
redis.call('HSET', content, 'batch', ARGV[3])
local surplus = redis.call('ZCARD', order) - tonumber(ARGV[4])
if surplus > 0 then
    for _, old in ipairs(redis.call('ZRANGE', order, 0, surplus - 1)) do redis.call('HDEL', content, 'e:' .. old) end
    redis.call('ZREMRANGEBYRANK', order, 0, surplus - 1)
end
redis.call('EXPIRE', order, ARGV[5])
redis.call('EXPIRE', content, ARGV[5])

local stored, numbers = 0, {ARGV[10], revision, ARGV[8]}
for task = 1, #KEYS - 4 - entries do
    local body = ARGV[first + 4 * entries + task - 1]
    stored = stored + store_result(KEYS[4 + entries + task], before[task], numbers, ARGV[12], body, ARGV[6])
end

for entry = 1, entries do
    local id = ARGV[first + 4 * (entry - 1)]
    redis.call('XACK', stream, ARGV[1], id)
    redis.call('XDEL', stream, id)
    redis.pcall('ZREM', waiting, id)  -- a note, no more
    if redis.call('TYPE', KEYS[4 + entry]).ok == 'hash' then
        redis.call('HSET', KEYS[4 + entry], 'done', ARGV[9], 'batch', ARGV[3], 'release', ARGV[7], 'revision', revision)
    end
end
return stored
"""
)

# Keep a user's results that a publication has computed for as long as new ones. Returns 1 if there is one of this
# choice under every key, else 0, and then nothing happened. One of another publication, also of a later one, is of a
# release that serves no more, or not yet. The same goes for the results of tasks with a query, which need not be there.
# KEYS: a result per task, those without a query first. ARGV: order of the publication, results' TTL, choice, number of
# tasks without a query.
RENEW = """
local kept = {}
for place, key in ipairs(KEYS) do
    local found = redis.pcall('HMGET', key, 'release_order', 'choice')
    if not found.err and tonumber(found[1] or '') == tonumber(ARGV[1]) and (found[2] or '') == ARGV[3] then
        kept[#kept + 1] = key
    elseif place <= tonumber(ARGV[4]) then
        return 0
    end
end
for _, key in ipairs(kept) do redis.call('EXPIRE', key, ARGV[2]) end
return 1
"""

# Store results that no event has asked for. Nothing happens if another publication serves by now, if the history has
# changed since they were computed, or if the user was erased and no event has come since. The release that serves wins
# over any other, also over a later one that was withdrawn, unless that knows more of the user (ADR 11); what it knew of
# a history that is no longer there, nobody knows any more.
# Returns -3 if another one serves, -1 if the history has changed, -2 for an erased user, else the number of results
# stored.
# KEYS: content of the history, erased users, the serving publication, then a result per task.
# ARGV: batch that changed the history last ('' if none), digest of the user, newest live event's microseconds (0 if
# there is none: whatever an event brings is newer), revision, order of the release, results' TTL, choice, then a body
# per task.
FILL = (
    _STORE_RESULT
    + """
local serving = redis.call('GET', KEYS[3])
if not serving or cjson.decode(serving).order ~= tonumber(ARGV[5]) then return -3 end
if (redis.call('HGET', KEYS[1], 'batch') or '') ~= ARGV[1] then return -1 end
local known = redis.call('EXISTS', KEYS[1]) == 1
if not known and redis.call('ZSCORE', KEYS[2], ARGV[2]) then return -2 end
local before = {}
for task = 1, #KEYS - 3 do
    local numbers = read_numbers(KEYS[3 + task])
    if tonumber(numbers[3]) ~= tonumber(ARGV[5]) then
        numbers = known and {numbers[1], numbers[2], 0} or {}
    end
    before[task] = numbers
end
local stored, numbers = 0, {ARGV[3], ARGV[4], ARGV[5]}
for task = 1, #KEYS - 3 do
    stored = stored + store_result(KEYS[3 + task], before[task], numbers, ARGV[7], ARGV[7 + task], ARGV[6])
end
return stored
"""
)

# Put a dead letter back into the stream, its mark as if it had just been accepted. Returns 1 if it is, 0 if the
# letter is gone, -1 if the stream is full.
# KEYS: stream, dead letters, mark, waiting.
# ARGV: letter, event JSON, accepted_at (seconds), mark's TTL, longest stream, version of the event's form, user (''
# if it is no event).
REPLAY = """
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[5]) then return -1 end
if redis.call('XDEL', KEYS[2], ARGV[1]) == 0 then return 0 end
local entry = redis.call('XADD', KEYS[1], '*', 'event', ARGV[2], 'accepted_at', ARGV[3], 'version', ARGV[6])
if ARGV[7] ~= '' then
    redis.call('DEL', KEYS[3])
    redis.call('HSET', KEYS[3], 'entry', entry, 'user', ARGV[7])
    redis.call('EXPIRE', KEYS[3], ARGV[4])
    redis.call('ZADD', KEYS[4], string.match(entry, '%d+'), entry)
    redis.call('EXPIRE', KEYS[4], ARGV[4])
end
return 1
"""

# Let an ad-hoc request wait: 1 it does, 0 too many do, -1 no ad-hoc worker is there. Instants are Redis' own.
# KEYS: requests, workers. ARGV: request JSON, how many may wait, seconds until its deadline.
ENQUEUE = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
if redis.call('ZCOUNT', KEYS[2], string.format('%.6f', now), '+inf') == 0 then return -1 end
if redis.call('LLEN', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('RPUSH', KEYS[1], string.format('%.6f', now + ARGV[3]) .. ' ' .. ARGV[1])
redis.call('EXPIRE', KEYS[1], math.ceil(ARGV[3]))
return 1
"""

# Move an entry to the dead letters; nothing happens if the entry has been finished or given up by another worker.
# Returns 1 if moved.
# KEYS: stream, dead letters; if it is an event, its mark, waiting.
# ARGV: group, entry id, instant, then fields and values of the letter.
GIVE_UP = """
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('XADD', KEYS[2], '*', unpack(ARGV, 4))
redis.call('XDEL', KEYS[1], ARGV[2])
if KEYS[3] then
    if redis.call('TYPE', KEYS[3]).ok == 'hash' then redis.call('HSET', KEYS[3], 'dead', ARGV[3]) end
    redis.pcall('ZREM', KEYS[4], ARGV[2])
end
return 1
"""

# Take over entries that have been idle for long, from a place in the list of pending ones on: a call looks at ten times
# COUNT of them at most, and says where to go on, which redis-py leaves out.
# KEYS: stream. ARGV: group, consumer, least idle time in milliseconds, place, how many at most.
CLAIM_STALE = "return redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], 'COUNT', ARGV[5], 'JUSTID')"

# Remove an idle consumer, unless something is pending for it, which Redis would forget with it. Returns 1 if removed.
# KEYS: stream. ARGV: group, consumer, least idle time in milliseconds.
FORGET_CONSUMER = """
for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
    local of = {}
    for place = 1, #row, 2 do of[row[place]] = row[place + 1] end
    if of.name == ARGV[2] and of.pending == 0 and of.idle >= tonumber(ARGV[3]) then
        redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
        return 1
    end
end
return 0
"""
