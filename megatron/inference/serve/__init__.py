"""A server for one model: OpenAI's API over HTTP, and a page that shows the experts of each token. `tools/serve.py` starts it.

server.py     starts, announces and stops everything
app.py        the paths and what each of them does
limits.py     what is checked before a request is read: key, host, size of the body
protocol.py   the fields of a request; errors.py   OpenAI's form of an error
prompts.py    from a request to prompts and engine requests; chat.py   the chat template
worker.py     the one thread that runs the engine
replies.py    the JSON of answers and of their parts
page/         the page, plain HTML, CSS and JavaScript
"""
