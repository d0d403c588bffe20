"""Lua scripts of the Valkey tier, run by the server: store, read and remove a record, and sum up sizes.

The counters are not trusted, since clients with access could make the store grow without limit or keep it empty. The
sum is recomputed from the records when it cannot be right, and about every 64th time anyway. Keys that do not begin
like a record's name are never removed, whatever the counters list.
"""

# KEYS: used, order, sizes, clock, then the record's. Sizes are stored beside the values, so that a value evicted by the
# server itself is still subtracted.
_COUNT = """
local prefix = string.match(KEYS[5], '^.*:chunk:')
for i, want in ipairs({'string', 'zset', 'hash', 'string'}) do
  local kind = redis.call('TYPE', KEYS[i]).ok
  if kind ~= want and kind ~= 'none' then redis.call('DEL', KEYS[i]) end
end
local function number(text)
  local n = tonumber(text or 'x')
  if n == nil or n ~= n or n < 0 or n > 9007199254740000 then return nil end
  return n
end
local function tick()
  local n = redis.pcall('INCR', KEYS[4])
  if type(n) ~= 'number' or number(n) == nil then
    n = (number(redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')[2]) or 0) + 1
    redis.call('SET', KEYS[4], string.format('%.0f', n))
  end
  return n
end
local function bytes_of(key)
  if redis.call('TYPE', key).ok ~= 'string' then return -1 end
  return redis.call('STRLEN', key)
end
local function keep(used)
  redis.call('SET', KEYS[1], string.format('%.0f', used))
end
local function ours(key)
  return string.sub(key, 1, #prefix) == prefix
end
local function recount()
  local sum = 0
  redis.call('DEL', KEYS[3])
  for _, key in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
    local size = ours(key) and bytes_of(key) or -1
    if size < 0 then redis.call('ZREM', KEYS[2], key)
    else redis.call('HSET', KEYS[3], key, size) sum = sum + size end
  end
  return sum
end
local function forget(key)
  redis.call('ZREM', KEYS[2], key)
  redis.call('HDEL', KEYS[3], key)
  if ours(key) and bytes_of(key) >= 0 then redis.call('DEL', key) end
end
"""
# ARGV: record, capacity, cursor of the scan over the server's keys. Each call scans some two hundred keys for records
# missing in the counters. Returns bytes stored, records evicted, and the new cursor.
_PUT = """
local size, capacity, cursor = #ARGV[1], tonumber(ARGV[2]), ARGV[3]
if size > capacity then return redis.error_reply('TOOLARGE') end
local now, used, gone = tick(), number(redis.call('GET', KEYS[1]) or '0'), 0
local walked = redis.pcall('SCAN', cursor, 'MATCH', prefix .. '*', 'COUNT', 200)
cursor = '0'
if walked.err == nil then
  cursor = walked[1]
  for _, key in ipairs(walked[2]) do
    if not redis.call('ZSCORE', KEYS[2], key) and bytes_of(key) >= 0 then
      redis.call('ZADD', KEYS[2], 0, key)
      used = nil
    end
  end
end
local there = bytes_of(KEYS[5])
if there ~= size then
  if redis.call('DEL', KEYS[5]) == 1 or redis.call('HEXISTS', KEYS[3], KEYS[5]) == 1 then used = nil end
  there = -1
end
local many = redis.call('ZCARD', KEYS[2])
if used == nil or used > capacity or now % 64 == 0 or redis.call('HLEN', KEYS[3]) ~= many or (used == 0) ~= (many == 0)
then used = recount() end
if there >= 0 then size = 0 end
while used + size > capacity do
  local oldest = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
  if not oldest then used = 0 break end
  local held = bytes_of(oldest)
  if held < 0 or not ours(oldest) then held = number(redis.call('HGET', KEYS[3], oldest)) or 0 end
  used = used - held
  forget(oldest)
  gone = gone + 1
end
if size > 0 then
  redis.call('SET', KEYS[5], ARGV[1])
  redis.call('ZADD', KEYS[2], now, KEYS[5])
  redis.call('HSET', KEYS[3], KEYS[5], size)
end
keep(used + size)
return {size, gone, cursor}
"""
# ARGV: maximum bytes that the caller can use. A value that is larger, of another type, or shorter than a preamble is
# removed, and '' is returned.
_GET = """
local size = bytes_of(KEYS[5])
if size < 0 then
  if redis.call('DEL', KEYS[5]) == 1 then return '' end
  return false
end
if size < 128 or size > tonumber(ARGV[1]) then forget(KEYS[5]) return '' end
redis.call('ZADD', KEYS[2], 'XX', tick(), KEYS[5])
return redis.call('GET', KEYS[5])
"""
# ARGV: the first bytes of the record that was read. Another client may have replaced it by a sound one since.
_DROP = """
if bytes_of(KEYS[5]) < 0 or redis.call('GETRANGE', KEYS[5], 0, #ARGV[1] - 1) ~= ARGV[1] then return 0 end
forget(KEYS[5])
keep(recount())
return 1
"""
_SUM = """
local used = recount()
keep(used)
return used
"""

SCRIPTS = tuple(_COUNT + script for script in (_PUT, _GET, _DROP, _SUM))
