"""The engine over HTTP. One service, thin dialects; text exists here, through chat/, and nowhere below.

service.py    requests in, answers and streams out: the only bridge between event loop and engine thread
guard.py      bodies, errors, keys, the list of routes
fields.py     sampling parameters in everybody's names
grammars.py   forms that the output must follow
text.py       what sampled tokens say, as they come
choices.py    routed experts, indexer sets and sampling supports in everybody's forms
sglang.py     /generate                          control.py   pause, abort, flush, health, information
sessions.py   SGLang's sessions of /generate     rpc.py       vLLM's /collective_rpc
trl.py        the routes of `trl vllm-serve`     communicator.py   … and how its weights come
tito.py       vLLM's /inference/v1/generate      vllm.py      vLLM's names for control, and the tokenizer
updates.py    weights while running              transfer.py  … by broadcast from a trainer
upkeep.py     weight checks, sleep               scores.py    log-probs of labels, embeddings
pull.py       published weights come here        profile.py   where the engine's thread spends its time
lora.py       adapters                           whose.py     priority, session, salt and adapter in everybody's words
openai.py     what OpenAI's routes share         chat.py, completions.py, responses.py   the routes
anthropic.py  /v1/messages                       parse.py     texts to calls and thoughts
metrics.py    Prometheus                         page.html    a chat page at /
"""
