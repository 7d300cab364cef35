"""A good body for every route that has one, with every kind of field."""

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "pattern": "a+", "maxLength": 3},
                                           "b": {"anyOf": [{"minimum": 2}, {"$ref": "#"}, {"enum": [1]}]}}}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
HELLO = [{"role": "user", "content": "hello"}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
TALK = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": None, "reasoning_content": "so", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "1"}]  # fmt: skip
SAMPLING = {"max_tokens": 3, "temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "n": 2, "seed": 1,
            "stop": ["x"], "stop_token_ids": [1], "logit_bias": {"5": 1.0}, "frequency_penalty": 0.1,
            "presence_penalty": 0.1, "repetition_penalty": 1.1, "min_tokens": 1}  # fmt: skip
NATIVE = {"max_new_tokens": 3, "temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "n": 2,
          "sampling_seed": 1, "stop": ["x"], "stop_token_ids": [1], "logit_bias": {"5": 1.0},
          "frequency_penalty": 0.1, "presence_penalty": 0.1, "repetition_penalty": 1.1, "min_new_tokens": 1,
          "custom_params": {"return_top_p_token_ids": True}}  # fmt: skip
TRL = {"n": 2, "repetition_penalty": 1.1, "temperature": 0.9, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_tokens": 3,
       "logprobs": 2, "structured_outputs_regex": None, "generation_kwargs": {"seed": 1}}  # fmt: skip
GROUP = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2, "group_name": "g",
         "backend": "nccl"}  # fmt: skip
TENSORS = {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]], "group_name": "g", "load_format": "flattened_bucket",
           "kv_policy": "keep", "weight_version": "1", "abort_all_requests": False}  # fmt: skip
ANTHROPIC_TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {"n": {"type": "integer"}}}}
SAID = [{"type": "thinking", "thinking": "so", "signature": ""}, {"type": "text", "text": "a"},
        {"type": "tool_use", "id": "c", "name": "f", "input": {"n": 1}}]  # fmt: skip
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "1"}]}
ANTHROPIC_TALK = [
    *HELLO,
    {"role": "assistant", "content": SAID},
    {"role": "user", "content": [RESULT, {"type": "text", "text": "b"}]},
]
ITEMS = [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
         {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
         {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"n": 1}'},
         {"type": "function_call_output", "call_id": "c", "output": "1"}]  # fmt: skip
# dialects that generate come first: a full queue must be a 429 in each
GENERATE = [
    ("/generate", {"input_ids": IDS, "sampling_params": NATIVE, "return_logprob": True, "logprob_start_len": 0,
                   "top_logprobs_num": 2, "token_ids_logprob": [1, 2], "rid": "a", "stream": False,
                   "return_routed_experts": True, "routed_experts_start_len": 2, "return_indexer_topk": True,
                   "return_sampling_mask": True, "sampling_logprobs_mode": "support",
                   "return_text_in_logprobs": True, "priority": 2, "routing_key": "k", "extra_key": "e",
                   "cache_salt": "s", "lora_path": None,
                   "session_params": {"id": None, "rid": "r", "offset": -1, "replace": True,
                                      "drop_previous_output": False}}),
    ("/generate", {"text": ["a", "b"], "sampling_params": [NATIVE, NATIVE], "return_logprob": [True, False],
                   "rid": ["x", "y"], "stream": True, "extra_key": ["e", None], "lora_path": [None, None]}),
    ("/inference/v1/generate", {"token_ids": IDS, "sampling_params": SAMPLING | {"logprobs": 1, "prompt_logprobs": 1},
                                "request_id": "r", "return_routed_experts": "compact", "output_mode": "text",
                                "return_sampling_mask": True, "priority": 1, "cache_salt": "s"}),
    ("/v1/completions", SAMPLING | {"prompt": "hello", "logprobs": 2, "echo": True, "return_routed_experts": True,
                                    "stream_options": {"include_usage": True}, "return_token_ids": True}),
    ("/v1/chat/completions", SAMPLING | {"messages": TALK, "tools": [TOOL], "logprobs": True, "top_logprobs": 2,
                                         "chat_template_kwargs": {"enable_thinking": True}, "tool_choice": "auto",
                                         "priority": -1, "cache_salt": "s", "session_id": "i",
                                         "parallel_tool_calls": False, "logit_bias": {}, "reasoning_effort": "low"}),
    ("/v1/chat/completions/tokens", SAMPLING | {"messages": TALK, "tokens": IDS, "tools": [TOOL], "logprobs": True,
                                                "return_token_ids": True, "max_completion_tokens": 3}),
    ("/generate/", TRL | {"prompts": ["a", "b"], "images": None}),
    ("/generate/", TRL | {"prompts": [IDS, IDS], "images": [None, None]}),
    ("/chat/", TRL | {"messages": [HELLO, TALK], "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": True}}),
    ("/v1/responses", {"input": ITEMS, "instructions": "s", "tools": [{"type": "function", "name": "f"}],
                       "tool_choice": "auto", "max_output_tokens": 3, "temperature": 0.5, "top_p": 0.9, "stream": False,
                       "reasoning": {"effort": "low"}, "metadata": {"a": "b"}, "text": {"format": {"type": "text"}}}),
    ("/generate", {"text": "a", "sampling_params": {"json_schema": SCHEMA, "max_new_tokens": 3}}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 3, "structured_outputs": {
        "json": SCHEMA, "whitespace_pattern": " ", "disable_any_whitespace": False}}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 3, "guided_choice": ["a", "b"], "ignore_eos": True}),
    ("/v1/chat/completions", {"messages": HELLO, "tools": [TOOL], "max_tokens": 3, "response_format": {
        "type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}}),
    ("/v1/messages", {"max_tokens": 3, "messages": ANTHROPIC_TALK, "system": "s", "thinking": {"type": "enabled"},
                      "tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "tool", "name": "f"},
                      "stop_sequences": ["x"], "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 1,
                      "output_config": {"effort": "low"}}),
]  # fmt: skip
GOOD = [
    *GENERATE,
    ("/v1/messages/count_tokens", {"messages": ANTHROPIC_TALK, "system": [{"type": "text", "text": "s"}]}),
    ("/get_sequence_logprobs/", {"sequences": [IDS], "prompt_lengths": [2], "top_logprobs": 3, "temperature": 1.0,
                                 "response_format": "binary"}),
    ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [1], "apply_softmax": True}),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
    ("/encode", {"input_ids": [IDS, IDS]}),
    ("/tokenize", {"prompt": "a", "return_token_strs": True}),
    ("/v1/tokenize", {"messages": TALK, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}),
    ("/detokenize", {"tokens": IDS}),
    ("/v1/detokenize", {"tokens": [IDS], "skip_special_tokens": True}),
    ("/parse_function_call", {"text": "<tool_call>f</tool_call>", "tools": [TOOL], "tool_call_parser": "glm47"}),
    ("/separate_reasoning", {"text": "a</think>b", "reasoning_parser": "glm45", "return_blocks": True}),
    ("/open_session", {"capacity_of_str_len": 1000, "streaming": False, "timeout": 60.0}),
    ("/slow_down", {"forward_sleep_time": 0.0}),
    ("/set_internal_state", {"server_args": {"max_running_requests": 4, "max_queued_requests": 64}}),
    ("/collective_rpc", {"method": "wake_up", "args": [], "kwargs": {"tags": ["weights"]}, "timeout": 1.0}),
    ("/abort_request", {"rid": "none", "abort_all": False}),
    ("/abort_requests", {"request_ids": ["none"]}),
    ("/pause_generation", {"mode": "in_place"}),
    ("/release_memory_occupation", {"tags": ["kv_cache"]}),
    ("/resume_memory_occupation", {"tags": ["kv_cache"]}),
    ("/weights_checker", {"action": "checksum", "skip_tensor_list": ["norm"]}),
    ("/weight_checker", {"action": "compare", "baseline": {"a": "b"}}),
    ("/post_process_weights", {"restore_weights_before_load": True, "post_process_quantization": True}),
    ("/update_weight_version", {"new_version": "2", "abort_all_requests": False}),
]  # fmt: skip
# good in form, but there is no such folder, tensor or trainer
REFUSED = [
    ("/update_weights_from_disk", {"model_path": "/nowhere", "kv_policy": "keep", "weight_version": "1",
                                   "manifest_sha256": "0"}),
    ("/areal_update_weights", {"model_path": "/nowhere"}),
    ("/update_weights_from_tensor", {"serialized_named_tensors": ["AAAA"], "load_format": None}),
    ("/update_weights_from_ipc", {"shared_memory": "nothing-here", "sha256": "0"}),
    ("/close_session", {"session_id": "none"}),
    ("/init_communicator/", {"host": "1.1.1.1", "port": 1, "world_size": 2, "client_device_uuid": "42"}),
    ("/update_named_param/", {"name": "a", "dtype": "torch.float32", "shape": [1]}),
    ("/end_weight_update", {"kv_policy": "keep", "weight_version": "1"}),
    ("/get_weights_by_name", {"name": "x", "truncate_size": 3}),
    ("/init_weights_update_group", GROUP),
    ("/areal_init_weights_update_group", GROUP | {"master_port": "1"}),
    ("/update_weights_from_distributed", TENSORS),
    ("/destroy_weights_update_group", {"group_name": "g"}),
    ("/init_weight_transfer_engine", {"init_info": {"master_address": "1.1.1.1", "master_port": 1, "rank_offset": 1,
                                                    "world_size": 2, "packed": True}}),
    ("/update_weights", {"update_info": {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]]}}),
    ("/finish_weight_update", {"weight_version": "2"}),
    ("/load_lora_adapter", {"lora_name": "a", "lora_path": "/nowhere", "added_tokens_config": None}),
    ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/nowhere", "load_inplace": True}),
    ("/areal_update_weights_lora", {"lora_name": "a-v1", "lora_model_path": "/nowhere", "base_model_name": "b"}),
    ("/pull_weights", {"local_checkpoint_dir": "/dev/null/local", "source_dir": "/nowhere", "target_version": 1}),
    ("/start_profile", {"output_dir": "/nowhere", "num_steps": 1}),
    ("/stop_profile", {}),
    ("/unload_lora_adapter", {"lora_name": "a"}),
    ("/v1/unload_lora_adapter", {"lora_name": "a"}),
    ("/init_broadcaster", {"host": "1.1.1.1", "port": 1, "rank_offset": 0, "inference_world_size": 1, "timeout": 1,
                           "quantize_in_weight_transfer": False}),
]  # fmt: skip
# what a later request must find as it was
LATER = [("/areal_set_update_weight_meta", TENSORS)]
ALL = [*GOOD, *REFUSED, *LATER]
