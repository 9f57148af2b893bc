def batch_to_transition(batch):
    seen = {key: value for key, value in batch.items() if key.startswith("observation.")}
    others = {key: value for key, value in batch.items() if key not in seen and key != "action"}
    return {"observation": seen, "action": batch.get("action"), "others": others}


def transition_to_batch(transition):
    action = {} if transition["action"] is None else {"action": transition["action"]}
    return {**transition["observation"], **action, **transition["others"]}


def policy_action_to_transition(action):
    return {"observation": {}, "action": action, "others": {}}


def transition_to_policy_action(transition):
    return transition["action"]
