"""The engine over HTTP. One service, thin dialects; text exists here, through chat/, and nowhere below.

service.py    requests in, answers and streams out: the only bridge between event loop and engine thread
guard.py      bodies, errors, keys, the list of routes
fields.py     sampling parameters in everybody's names
text.py       what sampled tokens say, as they come
sglang.py     /generate and its relatives        control.py   pause, abort, flush, health, information
updates.py    weights while running              vllm.py      vLLM's names for the same things
openai.py     /v1/chat/completions …             anthropic.py /v1/messages
metrics.py    Prometheus                         page.html    a chat page at /
"""
