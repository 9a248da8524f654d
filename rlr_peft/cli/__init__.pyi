from .serve_reward_command import ServeFlags as ServeFlags
