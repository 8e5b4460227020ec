"""Lua scripts: what must happen in Redis at once or not at all, and the names of all keys.

urm:events                    stream of accepted events; an entry is deleted when its result is stored, so its
                              length is the backlog
urm:events:dead               events given up, each with the reason
urm:event:{n}:{user}:{id}     hash: marks an accepted event, so that a retry is not processed again, and says what
                              became of it (lineage.py); n is the length of the user's id, so that no two share a key
urm:waiting:{user}            hash: entry id → event_id of the user's entries in the stream; a hint, for coalescing
urm:history:{user}            sorted set: event_id by time in microseconds, newest `history_events` kept
urm:history_events:{user}     hash: event_id → the event; `revision` counts its changes
urm:result:{user}:{task}      hash: body (JSON) and the three numbers that order results
urm:adhoc                       list of ad-hoc requests that wait, each behind its deadline
urm:adhoc:workers               sorted set: ad-hoc workers by the instant from which they count as gone
urm:adhoc:answer:{id}           list with the one answer to an ad-hoc request

Users and event ids may be any text, so they stand last in a name, or before a task, which has no colon.
"""

from __future__ import annotations

STREAM = "urm:events"
DEAD_STREAM = "urm:events:dead"
GROUP = "recall"
# A client may retry for this long, and an event be traced; an id seen again later counts as new to the stream, and the
# user's history still knows it.
MARK_TTL_SECONDS = 86_400
AD_HOC_REQUESTS = "urm:adhoc"
AD_HOC_WORKERS = "urm:adhoc:workers"


def accepted_key(user_id: str, event_id: str) -> str:
    """Key that marks an event of a user as accepted and holds its lineage."""
    return f"urm:event:{len(user_id)}:{user_id}:{event_id}"


def waiting_key(user_id: str) -> str:
    """Key of a user's unfinished entries."""
    return f"urm:waiting:{user_id}"


def history_keys(user_id: str) -> tuple[str, str]:
    """Keys of a user's recent events: their order, their content."""
    return f"urm:history:{user_id}", f"urm:history_events:{user_id}"


def result_key(user_id: str, task: str) -> str:
    """Key of a stored result."""
    return f"urm:result:{user_id}:{task}"


def ad_hoc_answer_key(request_id: str) -> str:
    """Key of the answer to an ad-hoc request."""
    return f"urm:adhoc:answer:{request_id}"


# Accept one event: 1 accepted, 0 seen before, -1 the stream is full, -3 its id was seen with another content.
# KEYS: stream, mark, waiting.
# ARGV: event JSON, accepted_at (seconds), mark's TTL, longest stream, user, traceparent or '', event_id,
# digest of the content.
ACCEPT = """
local digest = ARGV[#ARGV]
if redis.call('EXISTS', KEYS[2]) == 1 then
    local seen = redis.call('HGET', KEYS[2], 'digest')
    return seen and seen ~= digest and -3 or 0
end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[4]) then return -1 end
local fields = {'event', ARGV[1], 'accepted_at', ARGV[2]}
if ARGV[6] ~= '' then
    fields[5], fields[6] = 'traceparent', ARGV[6]
end
local entry = redis.call('XADD', KEYS[1], '*', unpack(fields))
redis.call('HSET', KEYS[2], 'entry', entry, 'user', ARGV[5], 'digest', digest)
redis.call('EXPIRE', KEYS[2], ARGV[3])
redis.call('HSET', KEYS[3], entry, ARGV[7])
redis.call('EXPIRE', KEYS[3], ARGV[3])
return 1
"""

# Take a finished entry out of the stream, and write into its event's mark, unless that has expired. Nothing happens, so
# that it stays pending, if Redis has lost its newest writes since the event was remembered: then the user's history is
# of an older revision than the result, or lacks the event although it has room. Nothing happens either if another
# worker has finished the entry or given it up. Returns 1 if the entry is finished by this.
# KEYS: stream, history (order, content), mark, what waits of the user.
# ARGV: group, entry id, event_id, events kept, revision of the result, then fields and values of the mark.
FINISH = """
if tonumber(redis.call('HGET', KEYS[3], 'revision') or 0) < tonumber(ARGV[5]) then return 0 end
if redis.call('HEXISTS', KEYS[3], 'e:' .. ARGV[3]) == 0 and redis.call('ZCARD', KEYS[2]) < tonumber(ARGV[4]) then
    return 0
end
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('XDEL', KEYS[1], ARGV[2])
if redis.call('TYPE', KEYS[4]).ok == 'hash' then redis.call('HSET', KEYS[4], unpack(ARGV, 6)) end
redis.call('HDEL', KEYS[5], ARGV[2])
return 1
"""

# Put a dead letter back into the stream, its mark as if it had just been accepted. Returns 0 if it is gone.
# KEYS: stream, dead letters, mark. ARGV: letter, event JSON, accepted_at (seconds), mark's TTL, user; '': no mark.
REPLAY = """
if redis.call('XDEL', KEYS[2], ARGV[1]) == 0 then return 0 end
local entry = redis.call('XADD', KEYS[1], '*', 'event', ARGV[2], 'accepted_at', ARGV[3])
if ARGV[5] ~= '' then
    redis.call('DEL', KEYS[3])
    redis.call('HSET', KEYS[3], 'entry', entry, 'user', ARGV[5])
    redis.call('EXPIRE', KEYS[3], ARGV[4])
end
return 1
"""

# Put the event of an entry into its user's recent history; again has no effect. Nothing happens if the entry is gone: a
# worker that stood still must not bring back what was given up meanwhile, for nobody would take it out again. What was
# finished meanwhile is in the history, as far as it is kept. The event's mark does not tell: it expires, and a replay
# starts it anew.
# Returns 0 if it is there already, 1 if it is new, 2 if it is new and older than the newest there, 3 if its entry is
# gone.
# KEYS: stream, order, content. ARGV: entry id, event_id, time in microseconds, event JSON, events kept, TTL.
REMEMBER = """
if #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) == 0 then return 3 end
local field = 'e:' .. ARGV[2]
local new = 0
if redis.call('HEXISTS', KEYS[3], field) == 0 then
    new = 1
    local newest = redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')
    if newest[2] and tonumber(newest[2]) > tonumber(ARGV[3]) then new = 2 end
    redis.call('ZADD', KEYS[2], ARGV[3], ARGV[2])
    redis.call('HSET', KEYS[3], field, ARGV[4])
    redis.call('HINCRBY', KEYS[3], 'revision', 1)
    local surplus = redis.call('ZCARD', KEYS[2]) - tonumber(ARGV[5])
    if surplus > 0 then
        for _, old in ipairs(redis.call('ZRANGE', KEYS[2], 0, surplus - 1)) do
            redis.call('HDEL', KEYS[3], 'e:' .. old)
        end
        redis.call('ZREMRANGEBYRANK', KEYS[2], 0, surplus - 1)
    end
end
redis.call('EXPIRE', KEYS[2], ARGV[6])
redis.call('EXPIRE', KEYS[3], ARGV[6])
return new
"""

# Store a result unless the stored one is newer by (event time, history revision, release order). Returns 1 if stored.
# The release comes last: what knows more of the user must not give way to a newer release that knows less (ADR 11).
# KEYS: result. ARGV: event time in microseconds, revision, release order, body, TTL.
STORE = """
local stored = redis.call('HMGET', KEYS[1], 'event_ts_us', 'revision', 'release_order')
for rank = 1, 3 do
    local old, new = tonumber(stored[rank]), tonumber(ARGV[rank])
    if old == nil or new > old then break end
    if new < old then return 0 end
end
redis.call('HSET', KEYS[1], 'event_ts_us', ARGV[1], 'revision', ARGV[2], 'release_order', ARGV[3], 'body', ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[5])
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

# Move an entry to the dead letters, and its event out of the history; nothing happens if the entry has been finished or
# given up by another worker. Returns 1 if moved.
# KEYS: stream, dead letters; if it is an event, its user's history (order, content), its mark, what waits of the user.
# ARGV: group, entry id, event_id or '', instant, then fields and values of the letter.
GIVE_UP = """
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('XADD', KEYS[2], '*', unpack(ARGV, 5))
redis.call('XDEL', KEYS[1], ARGV[2])
if KEYS[3] then
    redis.call('ZREM', KEYS[3], ARGV[3])
    if redis.call('HDEL', KEYS[4], 'e:' .. ARGV[3]) == 1 then redis.call('HINCRBY', KEYS[4], 'revision', 1) end
    if redis.call('TYPE', KEYS[5]).ok == 'hash' then redis.call('HSET', KEYS[5], 'dead', ARGV[4]) end
    redis.call('HDEL', KEYS[6], ARGV[2])
end
return 1
"""

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
