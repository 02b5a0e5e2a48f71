-- What wrk sends: payments of all kinds, each with an id of its own; and what became of each.
--
-- Arguments: the paths, with commas between; the name of the files that keep the ids which were answered with 201, one
-- for each thread; and a name that is a part of all ids. Prints, when it is done, how often each status was the answer, and the errors of wrk's own.

local threads = {}

function setup(thread)
   thread:set("number", #threads + 1)
   table.insert(threads, thread)
end

function init(args)
   paths = {}
   for path in args[1]:gmatch("[^,]+") do table.insert(paths, path) end
   saved = io.open(args[2] .. "." .. number, "w")
   saved:setvbuf("line")  -- what is read afterwards has to be in it
   name = args[3] or ""
   sent = 0
   wrk.headers["Connection"] = "close"  -- some servers close it after an error, with the next request on its way
   counts = {}
end

function request()
   sent = sent + 1
   local path = paths[sent % #paths + 1]
   return wrk.format("POST", path .. "?id=" .. path:match("%w+$") .. "-" .. name .. number .. "-" .. sent)
end

function response(status, headers, body)
   counts[status] = (counts[status] or 0) + 1
   if status == 201 then saved:write(body, "\n") end
   answered = ""
   for code, times in pairs(counts) do answered = answered .. code .. "=" .. times .. " " end
end

function done(summary, latency, requests)
   local errors = summary.errors
   for _, thread in ipairs(threads) do io.write("answered ", thread:get("answered") or "", "\n") end
   io.write(string.format("requests %d\n", summary.requests))
   io.write(string.format("connect=%d read=%d write=%d timeout=%d\n",
      errors.connect, errors.read, errors.write, errors.timeout))
end
