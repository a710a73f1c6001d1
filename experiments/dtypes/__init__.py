"""What a dtype costs: answers and kept image tokens in bfloat16 and with int8 weights, against float32."""
